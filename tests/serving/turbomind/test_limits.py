"""What a request may ask of a server on TurboMind, and what ``usage`` says; on the stand-in for its binding."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from parity.conversations import data_url, on_the_wire
from serving.client import chat, generate, image_item, message, post
from serving.configurations import ON_STAND_IN

from lmdeploy_vico.adapter.server.generation.control import LIFE

pytestmark = ON_STAND_IN

GREEDY = {'max_tokens': 8, 'temperature': 0, 'ignore_eos': True}
LACKING = 'is not available: TurboMind, which runs this server'


@pytest.mark.parametrize('n', [1, 2])
def test_usage_counts_visual_tokens_of_each_choice_once(client, prompts, judge, n):
    name = 'one photograph'
    answer = client.openai.chat.completions.create(
        model=client.model, messages=on_the_wire(prompts[name]), n=n, max_tokens=5, temperature=0,
        extra_body={'ignore_eos': True, 'return_token_ids': True},
    )  # fmt: skip
    assert len(answer.choices) == n
    assert len({tuple(choice.model_extra['output_ids']) for choice in answer.choices}) == 1
    tiles = judge().reference.encode([prompts[name][0]['content'][1]['image_url']['url']])[0].tile_tokens
    details = answer.usage.prompt_tokens_details.to_dict()
    assert details['image_tokens'] == sum(tiles)
    assert (details['image_tiles'], details['cached_tokens']) == (len(tiles), 0)
    assert answer.usage.completion_tokens == 5 * n


def test_stop_tokens_end_an_answer(client):
    free = generate(client, prompt='a', **GREEDY)[1]['output_ids']
    status, body = generate(client, prompt='a', max_tokens=8, temperature=0, ignore_eos=False, stop_token_ids=[free[3]])
    assert status == 200, body
    assert body['output_ids'] == free[: free.index(free[3])]
    assert body['meta_info']['finish_reason']['type'] == 'stop'


@pytest.mark.parametrize(('top_k', 'least_and_most'), [(3, (3, 3)), (30, (20, 21))])
def test_log_probabilities_of_sampled_answers(client, pictures, top_k, least_and_most):
    """They are those of the tokens that may be sampled, so that their probabilities add up to 1."""
    image = image_item(data_url(pictures['rocket']), max_dynamic_patch=1)
    sampled = {'temperature': 1.0, 'top_k': top_k, 'seed': 5, 'max_tokens': 3}
    status, body = chat(client, image, **sampled, logprobs=True, top_logprobs=20)
    assert status == 200, body
    content = body['choices'][0]['logprobs']['content']
    assert len(content) == 3
    for place in content:
        others = [one['logprob'] for one in place['top_logprobs']]  # LMDeploy names the generated token apart
        assert others == sorted(others, reverse=True)
        values = [place['logprob'], *others]
        assert max(values) < 0
        assert len(values) in least_and_most
        assert (sum(map(math.exp, values)) == pytest.approx(1, abs=1e-4)) == (top_k == 3)


@pytest.mark.parametrize('greedy', [{'temperature': 0}, {'top_k': 1}, {'min_p': 1}], ids=str)
def test_log_probabilities_of_greedy_answers_are_refused(client, greedy):
    """The only kept token would have one of 0."""
    sampled = {'temperature': 1.0, **greedy}
    status, body = chat(client, **sampled, logprobs=True, top_logprobs=4)
    assert status == 400 and 'Log probabilities need sampling here' in message(body), body
    status, body = generate(client, prompt='a', **sampled, return_logprob=True)
    assert status == 400 and 'Log probabilities need sampling here' in message(body), body
    assert chat(client, **sampled)[0] == 200


def test_sampling_with_a_seed_can_be_repeated(client, pictures):
    image = image_item(data_url(pictures['rocket']), max_dynamic_patch=1)
    answers = [chat(client, image, temperature=1.0, seed=seed)[1]['choices'][0]['output_ids'] for seed in (5, 5, 6)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    'extra',
    [{'logit_bias': {'5': 1}}, {'repetition_ngram_size': 3, 'repetition_ngram_threshold': 2, 'ignore_eos': False}],
    ids=lambda extra: next(iter(extra)),
)
def test_what_turbomind_lacks_is_refused(client, extra):
    status, body = chat(client, **extra)
    assert status == 400
    assert LACKING in message(body)


SCHEMA = {
    'type': 'object',
    'properties': {'colour': {'enum': ['red', 'green']}, 'round': {'type': 'boolean'}},
    'required': ['colour', 'round'],
}


def schema(value):
    return {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': value}}}


def test_answers_with_and_without_a_schema_side_by_side(client, pictures):
    """Only those follow it that ask for it, and their tokens are the most probable ones that it allows."""
    image = image_item(data_url(pictures['rocket']), max_dynamic_patch=1)
    free = {'ignore_eos': True}
    guided = {'ignore_eos': False, 'max_tokens': 40, **schema(SCHEMA)}
    alone = chat(client, image, **free)[1]['choices'][0]['output_ids']
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda asked: chat(client, image, **asked), [free, guided] * 4))
    for status, body in answers:
        assert status == 200, body
    for _, body in answers[::2]:
        assert body['choices'][0]['output_ids'] == alone
    for _, body in answers[1::2]:
        [choice] = body['choices']
        content = json.loads(choice['message']['content'])
        assert set(content) == {'colour', 'round'} and content['colour'] in ('red', 'green')
        assert isinstance(content['round'], bool) and choice['finish_reason'] == 'stop'
    assert 'disable guided decoding' not in client.server.log_text()


def test_a_grammar_that_ends_before_the_answer(client):
    status, body = chat(client, response_format={'type': 'regex_schema', 'regex_schema': 'ab'}, temperature=1.0)
    assert status == 200, body
    assert body['choices'][0]['message']['content'].startswith('ab')
    assert len(body['choices'][0]['output_ids']) == body['usage']['completion_tokens'] > 2


def test_text_is_no_grammar(client):
    assert chat(client, response_format={'type': 'text'})[1]['choices'][0]['output_ids']


@pytest.mark.parametrize(
    ('asked', 'problem'),
    [
        ({'response_format': {'type': 'regex_schema', 'regex_schema': '('}}, 'parenthesis is not closed'),
        (schema({'type': 'haiku'}), 'Unsupported type "haiku"'),
        (schema({'$ref': '#/$defs/none'}), 'cannot be compiled'),
        ({'response_format': {'type': 'regex_schema', 'regex_schema': 'a' * 10**6}}, 'at most 65536 bytes'),
    ],
    ids=['regex', 'type', 'reference', 'size'],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(client, asked, problem):
    status, body = chat(client, **asked)
    assert status == 400, body
    assert 'response_format' in message(body) and problem in message(body)
    assert 'disable guided decoding' not in client.server.log_text()


def test_scores_of_prompts_are_refused(client):
    status, body = generate(client, prompt='a', **{**GREEDY, 'max_tokens': 0}, return_logprob=True, logprob_start_len=0)
    assert status == 400
    assert 'supported only by the PyTorch' in message(body)  # LMDeploy's own words


@pytest.mark.parametrize('ids', [[10**6], [-1], []])
def test_ids_that_are_none(client, ids):
    status, _ = generate(client, input_ids=ids, **GREEDY)
    assert status == 400


def test_a_prompt_longer_than_the_context(client):
    status, body = chat(client, image_item('x', synthetic={'tiles': 40, 'compressed': 0, 'seed': 1}))
    assert status == 400
    assert 'context length (8192)' in message(body)


def test_synthetic_images(client):
    """Made-up visual tokens, with which a benchmark measures the language model alone, take the same way."""
    item = image_item('x', synthetic={'tiles': 4, 'compressed': 3, 'seed': 1})
    status, body = chat(client, item)
    assert status == 200, body
    assert body['usage']['prompt_tokens_details']['image_tokens'] == 3 * 64 + 256


def test_clients_do_not_control_the_engine(client):
    for path in ('/sleep?level=1', '/wakeup?tags=weights'):
        status, body = post(client, path, {})
        assert status == 400 and 'option control_endpoints' in message(body), path
    assert len(LIFE) == 2
    status, body = post(client, '/update_weights', {'serialized_named_tensors': 'x', 'finished': True})
    assert status == 400 and 'option control_endpoints' in message(body)
    assert generate(client, prompt='a', **GREEDY)[0] == 200
