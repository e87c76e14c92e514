"""LMDeploy's own features, untouched by visual tokens: prefix caching, chunked prefill, block sizes, TP, overrides."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving.client import Client
from serving.configurations import BLOCK, CACHING, TWO_RANKS

WITH_IMAGES = ('one photograph', 'two images with text between', 'images in the history', 'very tall')


def check_all(client, prompts, judge, **kind):
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(prompts, pool.map(client.chat, prompts.values()), strict=True))
    for name, answer in answers.items():
        judge(**kind).check(prompts[name], answer, name=name)
    return answers


LARGE_BLOCKS = ('--enable-prefix-caching', '--cache-block-seq-len', '128', '--max-prefill-token-num', '512')


@pytest.mark.parametrize(
    'block_size',
    [
        pytest.param(BLOCK, marks=CACHING),
        pytest.param(128, marks=[pytest.mark.served(*LARGE_BLOCKS), pytest.mark.long]),
    ],
)
def test_prefix_caching(client, prompts, judge, block_size):
    check_all(client, prompts, judge)
    for name in (*WITH_IMAGES, 'text only, two turns'):
        again = client.chat(prompts[name])
        judge().check(prompts[name], again, name=name)
        assert again.cached_tokens == (again.prompt_tokens - 1) // block_size * block_size, name
    # The same picture routed otherwise shares no visual token, so no stale answer.
    name = 'one photograph'
    other = client.chat(prompts[name], mm_processor_kwargs={'image': {'compression': 'all'}})
    judge().check(prompts[name], other, 'all', name=name)
    assert other.cached_tokens < block_size


@TWO_RANKS
def test_server_wide_compression_tensor_parallelism_and_trust(client, prompts, judge):
    """A server that may run remote code answers as one that may not."""
    for name in (*WITH_IMAGES[:2], 'text only'):
        judge().check(prompts[name], client.chat(prompts[name]), 0.25, name=name)


@pytest.mark.long
def test_remote_code_is_not_needed(serve, make_checkpoint, prompts, judge, tmp_path):
    kind = {'llm': 'moe', 'vit': 'rms_norm', 'dtype': 'float32'}
    checkpoint = shutil.copytree(make_checkpoint(**kind), tmp_path / 'checkpoint')
    (checkpoint / 'configuration_internvl_chat.py').write_text('raise RuntimeError("remote code was run")')
    server = serve(checkpoint, LMDEPLOY_VICO_COMPRESSION='none')
    client = Client(server)
    assert 'remote code was run' not in server.log_text()
    for name in WITH_IMAGES[:2]:
        judge(**kind).check(prompts[name], client.chat(prompts[name]), 'none', name=name)
    server.stop()
