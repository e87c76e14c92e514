"""Whatever parameters a client sends, the engine lives, and an ordinary request is answered as before."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving.client import message, post
from serving.configurations import COMPRESSED

pytestmark = COMPRESSED

MESSAGES = [{'role': 'user', 'content': 'x'}]
LENGTH = 3
CHAT, COMPLETIONS, GENERATE = '/v1/chat/completions', '/v1/completions', '/generate'
MESSAGE, RESPONSES, PERPLEXITY = '/v1/messages', '/v1/responses', '/get_ppl'
BODIES = {
    CHAT: {'messages': MESSAGES, 'max_tokens': LENGTH},
    COMPLETIONS: {'prompt': 'x', 'max_tokens': LENGTH},
    GENERATE: {'prompt': 'x', 'max_tokens': LENGTH},
    MESSAGE: {'messages': MESSAGES, 'max_tokens': LENGTH},
    RESPONSES: {'input': 'x', 'max_output_tokens': LENGTH},
}
GREEDY = {'temperature': 0, 'ignore_eos': True, 'return_token_ids': True}


def ask(client, path, **body):
    given = {'model': client.model, **BODIES.get(path, {}), **body}
    return post(client, path, {name: value for name, value in given.items() if value is not ...})


def answer(client):
    status, body = ask(client, CHAT, **GREEDY)
    assert status == 200, body
    return body['choices'][0]['output_ids']


@pytest.fixture(scope='module')
def known():
    """The answer to an ordinary request, as it was at first."""
    return []


@pytest.fixture(autouse=True)
def others_notice_nothing(client, known):
    known[:] = known or [answer(client)]
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ask, client, CHAT, **GREEDY, max_tokens=20)
        yield
        status, body = beside.result()
    assert status == 200, body
    assert answer(client) == known[0]


NESTED = 'x'
for _ in range(300):
    NESTED = {'a': NESTED}
NO_ROLE = 'is not available: this server has no role in disaggregated serving'

CONTROL = {
    '/sleep?level=1': {},
    '/wakeup?tags=weights': {},
    '/update_weights': {'serialized_named_tensors': 'x', 'finished': True},
    '/init_weights_update_group': {
        'master_address': '127.0.0.1', 'master_port': 1, 'rank_offset': 0, 'world_size': 1, 'group_name': 'x'
    },
    '/update_weights_from_distributed': {'names': ['x'], 'dtypes': ['x'], 'shapes': [[1]], 'group_name': 'x'},
    '/destroy_weights_update_group': {'group_name': 'x'},
}  # fmt: skip

REFUSED = [
    *((path, {'repetition_penalty': value}, 'repetition_penalty must be a number from 0.01 to 100')
      for path in (CHAT, COMPLETIONS, GENERATE, RESPONSES) for value in (0, -1, 1e300, math.inf, math.nan)),
    *((path, {'min_p': value}, 'min_p must be') for path in (COMPLETIONS, GENERATE) for value in (-1, 5, math.nan)),
    *((path, {'top_k': -1}, 'cannot be a negative integer') for path in BODIES),
    *((path, {'temperature': math.nan}, 'must be in [0,') for path in BODIES),
    *((path, {name: value}, NO_ROLE) for path in (CHAT, COMPLETIONS)
      for name, value in (('preserve_cache', True), ('with_cache', True), ('migration_request', {}))),
    *((path, {'migration_request': value}, 'must be an object') for path in (CHAT, COMPLETIONS) for value in ('x', 5)),
    (CHAT, {'migration_request': {'protocol': 9}}, 'protocol: '),
    (CHAT, {'n': 2, 'migration_request': {}}, NO_ROLE),
    (CHAT, {'logit_bias': {'x': 1}}, 'must be token ids'),
    (CHAT, {'logit_bias': {'4096': 1}}, 'A token id of logit_bias must be an integer from 0 to 1023, not 4096.'),
    (CHAT, {'logit_bias': {'-1': 1}}, 'A token id of logit_bias must be an integer from 0 to 1023, not -1.'),
    (CHAT, {'top_logprobs': 21, 'logprobs': True}, 'must be in [0, 20]'),
    (CHAT, {'min_new_tokens': LENGTH + 1}, 'min_new_tokens must be at most max_tokens, 3, not 4.'),
    (CHAT, {'min_new_tokens': 2**70}, 'min_new_tokens must be an integer from 0 to'),
    (CHAT, {'repetition_ngram_size': 2**63, 'repetition_ngram_threshold': 1}, 'must be an integer from 0 to 1024'),
    (CHAT, {'repetition_ngram_size': 2, 'repetition_ngram_threshold': 2**63}, 'an integer from 0 to 2147483647'),
    (CHAT, {'repetition_ngram_size': 2, 'repetition_ngram_threshold': 2, 'ignore_eos': True}, 'with its end token'),
    (CHAT, {'stop': ['x'] * 17}, 'stop must have at most 16 items'),
    *((path, {'stop': ''}, 'a text that is not empty') for path in (CHAT, COMPLETIONS, GENERATE, RESPONSES)),
    (MESSAGE, {'stop_sequences': ['']}, 'a text that is not empty'),
    (CHAT, {'response_format': {'type': 'regex_schema', 'regex_schema': '('}}, 'parenthesis is not closed'),
    (CHAT, {'response_format': {'type': 'regex_schema', 'regex_schema': 'a' * 10**6}}, 'at most 65536 bytes'),
    (CHAT, {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': NESTED}}}, '64 levels'),
    (RESPONSES, {'text': {'format': {'type': 'json_schema', 'name': 'x', 'schema': {'type': 'haiku'}}}},
     'Unsupported type "haiku"'),
    (COMPLETIONS, {'prompt': ''}, 'The prompt must not be empty.'),
    (COMPLETIONS, {'prompt': []}, 'The prompt must not be empty.'),
    (COMPLETIONS, {'prompt': ['x', '']}, 'The prompt must not be empty.'),
    (COMPLETIONS, {'n': 2}, 'n must be 1 here, not 2'),
    (COMPLETIONS, {'logprobs': 10**6}, 'logprobs are not returned by /v1/completions'),
    (COMPLETIONS, {'logprobs': 1, 'stream': True}, 'logprobs are not returned by /v1/completions'),
    (GENERATE, {'return_logprob': True, 'top_logprobs_num': 10**6}, 'logprobs must be an integer from 0 to 1024'),
    (GENERATE, {'return_logprob': True, 'max_tokens': 0, 'logprob_start_len': 2**70}, 'from -1 to 2147483647'),
    (GENERATE, {'prompt': ..., 'input_ids': []}, 'must not be an empty list'),
    (GENERATE, {'prompt': ..., 'input_ids': [10**6]}, 'must be integers from 0 to 1023'),
    *((GENERATE, {'stop_token_ids': [value]}, 'stop_token_ids must be an integer from 0 to') for value in (-1, 2**70)),
    *((PERPLEXITY, {'input': ids}, 'must be integers from 0 to 1023') for ids in ([5, 10**6], [-1, 5], [2**70, 5])),
    (PERPLEXITY, {'input': [5] * 40960}, 'must have fewer tokens than the context, 40960, not 40960.'),
    *((path, body, 'do not control its engine (option control_endpoints)') for path, body in CONTROL.items()),
    ('/pooling', {'input': 'x'}, 'gives no reward scores'),
    ('/distserve/free_cache', {'remote_session_id': 0, 'remote_engine_id': 'x'}, 'no role in disaggregated serving'),
    ('/distserve/p2p_drop_connect', {'engine_id': 'x', 'remote_engine_id': 'y'}, 'no role in disaggregated serving'),
]  # fmt: skip


@pytest.mark.parametrize('path, body, part', REFUSED, ids=lambda value: str(value)[:60])
def test_refused(client, path, body, part):
    status, answered = ask(client, path, **body)
    assert status == 400, answered
    assert part in message(answered)
    assert len(str(answered)) < 2000


HUGE = (2**63, 10**6)
TAKEN = [
    *((path, {'top_k': value, 'temperature': 1.0}) for path in BODIES for value in HUGE),
    *((path, {'temperature': value}) for path in BODIES for value in (1e-46, 1e-40, 1e-7)),
    *((path, {'top_p': 1e-45, 'temperature': 1.0}) for path in BODIES),
    *((path, {'seed': value, 'temperature': 1.0}) for path in (CHAT, COMPLETIONS) for value in (-1, 2**64, None)),
    (CHAT, {'min_p': 1, 'temperature': 1.0}),
    (CHAT, {'logprobs': True, 'top_logprobs': 20}),
    (CHAT, {'stop': ['x', '\n']}),
    (CHAT, {'session_id': 2**70}),
    (CHAT, {'response_format': {'type': 'regex_schema', 'regex_schema': '[ab]+'}}),
    (CHAT, {'response_format': {'type': 'regex_schema', 'regex_schema': 'a'}, 'ignore_eos': True, 'temperature': 1.0}),
    (CHAT, {'response_format': {'type': 'json_object'}, 'min_new_tokens': LENGTH}),
    (CHAT, {'repetition_ngram_size': 1, 'repetition_ngram_threshold': 1}),
    (GENERATE, {'stop': 'x'}),
    (GENERATE, {'stop_token_ids': list(range(1000)), 'ignore_eos': True, 'temperature': 1.0}),
    (GENERATE, {'return_logprob': True, 'top_logprobs_num': 1000}),
    (COMPLETIONS, {'n': None}),
    (PERPLEXITY, {'input': [5, 6, 7]}),
]


@pytest.mark.parametrize('path, body', TAKEN, ids=lambda value: str(value)[:60])
def test_taken_or_clamped(client, path, body):
    status, answered = ask(client, path, **body)
    assert status == 200, answered


@pytest.mark.parametrize('sampling', [{'temperature': 0}, {'temperature': 2.0, 'seed': 3}], ids=str)
def test_logit_bias_forces_and_bans(client, sampling):
    def ids(bias):
        status, body = ask(client, CHAT, **GREEDY | sampling, max_tokens=8, logit_bias=bias)
        assert status == 200, body
        return body['choices'][0]['output_ids']

    free = ids({})
    assert ids({'65': 100}) == [65] * 8
    assert ids({'930': 100}) == [930] * 8  # a token that was added to the vocabulary
    banned = ids({str(token): -100 for token in set(free)})
    assert not set(banned) & set(free)


def test_two_requests_of_one_session(client):
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, client, GENERATE, session_id=5, max_tokens=200, ignore_eos=True) for _ in range(2)]
        statuses = [status for status, _ in (one.result() for one in asked)]
    assert set(statuses) <= {200, 400, 409} and 200 in statuses
    assert ask(client, GENERATE, session_id=5)[0] == 200, 'the id is free again'
