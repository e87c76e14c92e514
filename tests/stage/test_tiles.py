import threading

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from lmdeploy_vico.stage.tiles import TileCache

pytestmark = pytest.mark.busy

PATCHES = torch.zeros(4, 8)  # 128 bytes
PIXELS = np.zeros((1, 448, 448, 3), np.uint8)


def get(cache, name):
    [tile] = cache.get([name.encode()], PIXELS)
    return tile


def encode(cache, name):
    tile = get(cache, name)
    tile.patches = PATCHES
    cache.keep(tile)


def kept(cache, names):
    """Which of ``names`` are kept, least recently used first."""
    return [name.decode() for name in cache._kept if name.decode() in names]


def read(name):
    return REGISTRY.get_sample_value(f'vico:embedding_cache_{name}') or 0


def test_least_recently_used_tiles_go_first():
    cache = TileCache(3 * PATCHES.nbytes)
    before = {name: read(name) for name in ('hits_total', 'misses_total', 'evictions_total')}
    for name in 'abc':
        encode(cache, name)
    assert get(cache, 'a').encoded  # used again
    encode(cache, 'd')
    assert kept(cache, 'abcd') == ['c', 'a', 'd']
    assert not get(cache, 'b').encoded
    assert read('current_bytes') == 3 * PATCHES.nbytes
    gained = {name: read(name) - value for name, value in before.items()}
    assert gained == {'hits_total': 1, 'misses_total': 5, 'evictions_total': 1}


@pytest.mark.parametrize('capacity, names', [(0, ''), (127, ''), (128, 'b'), (255, 'b'), (256, 'ab')])
def test_bounded_in_bytes(capacity, names):
    cache = TileCache(capacity)
    for name in 'ab':
        encode(cache, name)
    assert kept(cache, 'ab') == list(names)
    assert [get(cache, name).encoded for name in 'ab'] == [name in names for name in 'ab']


def test_what_a_prompt_holds_is_found_though_nothing_is_kept():
    cache = TileCache(0)
    tile = get(cache, 'a')
    assert get(cache, 'a') is tile
    tile.patches = PATCHES
    cache.keep(tile)
    assert get(cache, 'a') is tile
    del tile
    assert not get(cache, 'a').encoded


def test_a_tile_that_was_given_up_is_made_anew():
    cache = TileCache(1000)
    tile = get(cache, 'a')
    tile.error = RuntimeError('device trouble')
    assert get(cache, 'a') is not tile


def test_the_same_tile_twice_in_an_image():
    first, second = TileCache(0).get([b'a', b'a'], np.concatenate([PIXELS] * 2))
    assert first is second


def test_cleared_it_keeps_nothing_and_goes_on():
    cache = TileCache(2 * PATCHES.nbytes)
    for name in 'ab':
        encode(cache, name)
    evictions = read('evictions_total')
    cache.clear()
    assert kept(cache, 'ab') == [] and read('current_bytes') == 0 and read('evictions_total') == evictions
    assert not get(cache, 'a').encoded
    for name in 'cd':
        encode(cache, name)
    assert kept(cache, 'cd') == ['c', 'd'] and read('current_bytes') == 2 * PATCHES.nbytes


def test_kept_once_however_often():
    cache = TileCache(1000)
    tile = get(cache, 'a')
    tile.patches = PATCHES
    for _ in range(3):
        cache.keep(tile)
    assert read('current_bytes') == PATCHES.nbytes


def test_many_threads():
    cache = TileCache(10 * PATCHES.nbytes)
    names = [str(number) for number in range(30)]
    errors = []

    def work(seed):
        try:
            for name in np.random.default_rng(seed).permutation(names * 20):
                encode(cache, name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(kept(cache, names)) == 10 and read('current_bytes') == 10 * PATCHES.nbytes
