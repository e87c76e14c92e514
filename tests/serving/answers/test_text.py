"""The text of an answer is the decoding of its tokens: Chinese and emoji cut anywhere, streamed or not."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from lmdeploy.tokenizer import Tokenizer
from serving.client import post, stream
from serving.configurations import COMPRESSED

pytestmark = COMPRESSED

TOGETHER = 16
SAMPLE = '猫在桌上看🚀和🇨🇳。'
LONGEST = 24  # tokens


@pytest.fixture(scope='module')
def tokenizer(make_checkpoint):
    return Tokenizer(str(make_checkpoint())).model.model


def chat(client, body, streamed):
    """Text and ids of a chat answer, whose client asks for bytes of Chinese and emoji."""
    body = {'model': client.model, 'return_token_ids': True, **body}
    if not streamed:
        status, answer = post(client, '/v1/chat/completions', body)
        assert status == 200, answer
        choice = answer['choices'][0]
        return choice['message']['content'] or '', choice['output_ids']
    choices = [event['choices'][0] for event in stream(client, '/v1/chat/completions', body)]
    text = ''.join(choice['delta'].get('content') or '' for choice in choices)
    return text, [token for choice in choices for token in choice.get('output_ids') or []]


def generate(client, body, streamed):
    """Text and ids of an answer of /generate."""
    if not streamed:
        status, answer = post(client, '/generate', body)
        assert status == 200, answer
        return answer['text'], answer['output_ids']
    events = stream(client, '/generate', body)
    return ''.join(event['text'] for event in events), [token for event in events for token in event['output_ids']]


def complete(client, body, streamed):
    """Text of an answer of /v1/completions, which has no ids."""
    body = {'model': client.model, **body}
    if streamed:
        return ''.join(event['choices'][0]['text'] for event in stream(client, '/v1/completions', body))
    status, answer = post(client, '/v1/completions', body)
    assert status == 200, answer
    return answer['choices'][0]['text']


def requests(tokenizer):
    """How each of the answers is asked for."""
    source = random.Random(7)
    biased = {str(token): 100 for token in tokenizer.encode(SAMPLE, add_special_tokens=False)}
    for number in range(3 * TOGETHER):
        length = source.randint(1, LONGEST)
        # Greedy, all of them: where a batch samples as well, LMDeploy chooses otherwise among equal logits.
        common = {'max_tokens': length, 'ignore_eos': True, 'temperature': 0}
        common['skip_special_tokens'] = source.random() < 0.5
        message = {'role': 'user', 'content': f'{SAMPLE} {number}'}
        yield chat, {**common, 'logit_bias': biased, 'messages': [message]}
        yield generate, {**common, 'prompt': f'{SAMPLE}{number}'}


def check(client, tokenizer, way, body):
    """Ask twice, the second time for a stream; a completion of the same prompt has the same text."""
    texts = set()
    for streamed in (False, True):
        text, ids = way(client, body, streamed)
        assert len(ids) == body['max_tokens']
        assert text == tokenizer.decode(ids, skip_special_tokens=body['skip_special_tokens'])
        texts.add(text)
        if way is generate:
            assert complete(client, body, streamed) == text
    assert len(texts) == 1
    return text


@pytest.mark.parametrize('clients', [1, TOGETHER])
def test_text_is_the_decoding_of_its_tokens(client, tokenizer, clients):
    every = list(requests(tokenizer))[: None if clients > 1 else TOGETHER]
    with ThreadPoolExecutor(clients) as pool:
        texts = list(pool.map(lambda asked: check(client, tokenizer, *asked), every))
    assert any(text.endswith('�') for text in texts), 'no answer ends within a character'
    assert any('一' <= character <= '鿿' or character > '\uffff' for text in texts for character in text)


def test_a_stop_token_cuts_within_a_character(client, tokenizer):
    ids = tokenizer.encode('猫', add_special_tokens=False)
    body = {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': LONGEST, 'temperature': 0, 'ignore_eos': True}
    for token in ids:
        bias = {str(token): 100}
        text, given = chat(client, {**body, 'logit_bias': bias}, streamed=True)
        assert given == [token] * LONGEST
        assert text == tokenizer.decode(given)
    for shown in (False, True):
        body = {'prompt': SAMPLE, 'max_tokens': LONGEST, 'temperature': 0, 'include_stop_str_in_output': shown}
        free = generate(client, {**body, 'ignore_eos': True}, streamed=False)[1]
        for streamed in (False, True):
            text, given = generate(client, {**body, 'stop_token_ids': [free[5]]}, streamed)
            end = free.index(free[5])
            assert given == free[: end + shown]
            assert text == tokenizer.decode(free[:end], skip_special_tokens=True) + tokenizer.decode(given[end:])


def test_log_probabilities_name_the_bytes_of_tokens(client, tokenizer):
    """Those of an id that has no token, too: the model's vocabulary is larger than the tokenizer's."""
    forced = [*tokenizer.encode('猫', add_special_tokens=False), 220, 1000]
    body = {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 1, 'temperature': 0, 'ignore_eos': True}
    named = []
    for token in forced:
        asked = {'model': client.model, **body, 'logprobs': True, 'top_logprobs': 1, 'logit_bias': {str(token): 100}}
        status, answer = post(client, '/v1/chat/completions', asked)
        assert status == 200, answer
        named.append(answer['choices'][0]['logprobs']['content'][0])
    assert bytes(byte for place in named for byte in place['bytes']).decode() == '猫 '
    assert [place['token'] for place in named[-2:]] == [' ', '']
