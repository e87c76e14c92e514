"""Pictures that come again: encoded once, at whatever compression they are asked for, within the bytes allowed."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from parity.judge import TOKENS, Answer
from PIL import Image
from prometheus_client import REGISTRY
from serving.configurations import BLOCK, CACHING

from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE

CLIENTS = 8
GREEDY = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
HITS = 'vico:embedding_cache_hits_total'


def conversation(text, *pictures):
    items = [{'type': 'image_url', 'image_url': {'url': picture}} for picture in pictures]
    return [{'role': 'user', 'content': [*items, {'type': 'text', 'text': text}]}]


def unseen(picture, client):
    """The picture turned round its edges, which nobody has sent to this server before."""
    down, right = divmod(client.encoded_tiles() + 1, picture.width)  # grows with every such picture
    return Image.fromarray(np.roll(picture, (down, right), (0, 1)))


@pytest.fixture(scope='module')
def tile_count(judge):
    return lambda picture: len(judge().reference.tile(picture))


@CACHING
def test_repeat_costs_neither_encoding_nor_prefill(client, pictures, judge, tile_count):
    picture = unseen(pictures['coffee'], client)
    messages = conversation('What is this?', picture)
    tiles = tile_count(picture)
    before = client.encoded_tiles()
    first = client.chat(messages)
    encoded, hits = client.encoded_tiles(), client.metric(HITS)
    again = client.chat(messages)
    assert encoded == before + tiles and client.encoded_tiles() == encoded
    assert client.metric(HITS) == hits + tiles
    assert first.cached_tokens < BLOCK
    assert again.cached_tokens == (again.prompt_tokens - 1) // BLOCK * BLOCK
    for answer in (first, again):
        judge().check(messages, answer)


@CACHING
def test_prompts_of_another_salt_share_what_comes_before_the_first_picture(client, pictures, judge):
    """Every span of visual tokens has the salt in its name; text has none in LMDeploy's cache."""
    messages = conversation('What is this?', unseen(pictures['coffee'], client))
    first = client.chat(messages, cache_salt='a')
    assert client.chat(messages, cache_salt='a').cached_tokens == (first.prompt_tokens - 1) // BLOCK * BLOCK
    for other in ({'cache_salt': 'b'}, {}):
        answer = client.chat(messages, **other)
        assert answer.cached_tokens < BLOCK
        judge().check(messages, answer)


@CACHING
def test_no_stale_answer_after_changing_compression(client, pictures, judge):
    messages = conversation('Describe both.', pictures['chelsea'], pictures['page'])
    lengths = {}
    for turn, compression in enumerate(['none', 'all', 0.5, 'auto', 'none', 'all', 0.5, 'auto']):
        encoded = client.encoded_tiles()
        answer = client.chat(messages, mm_processor_kwargs={'image': {'compression': compression}})
        judge().check(messages, answer, compression, name='two pictures')
        assert turn == 0 or client.encoded_tiles() == encoded, compression
        lengths.setdefault(compression, answer.prompt_tokens)
    assert lengths['all'] < lengths['auto'] <= lengths[0.5] < lengths['none']


@CACHING
def test_same_picture_twice_in_a_prompt_is_encoded_once(client, pictures, judge, tile_count):
    picture = unseen(pictures['rocket'], client)
    messages = conversation('Find the differences.', picture, picture)
    before = client.encoded_tiles()
    judge().check(messages, client.chat(messages))
    assert client.encoded_tiles() - before == tile_count(picture)


@CACHING
@pytest.mark.busy
def test_same_picture_of_many_clients_at_once_is_encoded_once(client, pictures, judge, tile_count):
    picture = unseen(pictures['astronaut'], client)
    asked = [conversation(f'Say {number}.', picture) for number in range(CLIENTS)]
    before = client.encoded_tiles()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client.chat, asked))
    assert client.encoded_tiles() - before == tile_count(picture)
    for messages, answer in zip(asked, answers, strict=True):
        judge().check(messages, answer)


# --- the limit in bytes ----------------------------------------------------------------------------------------------


class Pipeline:
    """A pipeline whose cache is limited, and the counters of its stage, which are this process's."""

    def __init__(self, pipe):
        self.pipe = pipe

    def ask(self, messages):
        """The answer, and how many tiles were encoded for it."""
        before = metric('vico:encoder_tiles_per_batch_sum')
        [answer] = self.pipe([messages], gen_config=GREEDY)
        encoded = metric('vico:encoder_tiles_per_batch_sum') - before
        return Answer(tuple(answer.token_ids), answer.input_token_len), encoded


def metric(name):
    return REGISTRY.get_sample_value(name)


@pytest.fixture
def limited(make_checkpoint, monkeypatch):
    """``limited(cache_bytes)``: a pipeline."""
    pipelines = []

    def start(cache_bytes):
        monkeypatch.setenv('LMDEPLOY_VICO_CACHE_BYTES', str(cache_bytes))
        pipelines.append(
            pipeline(str(make_checkpoint()), backend_config=PytorchEngineConfig(**TINY_ENGINE, session_len=8192))
        )
        return Pipeline(pipelines[-1])

    yield start
    for pipe in pipelines:
        pipe.close()


@pytest.mark.server
def test_evicted_by_bytes(limited, make_checkpoint, pictures, judge, tile_count):
    width = json.loads((make_checkpoint() / 'config.json').read_text())['vision_config']['hidden_size']
    small, large = pictures['page'], pictures['coffee']
    tile = 1024 * width * 4  # bytes: float32 patch tokens
    capacity = (tile_count(small) + 1) * tile
    assert tile_count(large) * tile // 2 > capacity - tile  # in bfloat16, too, it drives the small one out
    asked = {'small': conversation('Read.', small), 'large': conversation('Look.', large)}
    server = limited(capacity)
    evictions = metric('vico:embedding_cache_evictions_total')
    encoded = []
    for name in ('small', 'small', 'large', 'small', 'small'):
        answer, tiles = server.ask(asked[name])
        judge().check(asked[name], answer, name=name)
        encoded.append(tiles)
        assert 0 < metric('vico:embedding_cache_current_bytes') <= capacity
    assert encoded == [tile_count(small), 0, tile_count(large), tile_count(small), 0]
    assert metric('vico:embedding_cache_evictions_total') > evictions


@pytest.mark.server
def test_without_a_cache_a_repeat_is_encoded_again(limited, pictures, judge, tile_count):
    messages = conversation('Read.', pictures['page'])
    server = limited(0)
    for _ in range(2):
        answer, encoded = server.ask(messages)
        judge().check(messages, answer, name='page')
        assert encoded == tile_count(pictures['page'])
