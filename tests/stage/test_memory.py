"""The pinned memory of a stage is taken once, and comes back as soon as nobody has it.

CUDA's parts are stand-ins, and so is the ViT; batches, projectors and the memory itself are real.
"""

import threading
import weakref
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from stage.stand_in import with_cheap_tower
from waiting import HANG

from lmdeploy_vico.stage import memory
from lmdeploy_vico.stage.errors import EncodingError
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.memory import StageMemory
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.stage.tiles import TileCache
from lmdeploy_vico.vision.arena import block_sizes
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling

WIDTH = 64  # of the tiny ViT
TILE = 1024 * WIDTH * 4  # bytes: float32 patch tokens
PINNED_BY_A_DEVICE = 6  # for each of two batches: tiles, patches and scores

pytestmark = pytest.mark.busy


@pytest.fixture(scope='module')
def encoder(make_checkpoint):
    """Computes what a stage's results have to be, with batches of one tile."""
    return VisionEncoder(with_cheap_tower(TileEncoder.from_pretrained(make_checkpoint())))


@pytest.fixture(scope='module')
def expect(encoder, pictures):
    """``expect(name, compression)``: the visual tokens of a picture that is alone in its prompt."""
    return cache(lambda name, compression='auto': encoder.encode([pictures[name]], compression)[0])


@pytest.fixture(scope='module')
def loaded(make_checkpoint):
    return with_cheap_tower(TileEncoder.from_pretrained(make_checkpoint(), tile_batch=2))


@pytest.fixture
def start(loaded, cuda, monkeypatch):
    """``start(devices, waiting, ...)``: a stage on so many stand-ins, each with batches of two tiles."""
    stages = []

    def start(devices=1, waiting=64, **options):
        monkeypatch.setattr(memory, 'WAITING_TILES', waiting)
        encoders = [deepcopy(loaded) for _ in range(devices)]
        assert encoders[0].config.vision.hidden_size == WIDTH
        stages.append(VisionStage([cuda.encoder(one) for one in encoders], torch.float32, threads=2, **options))
        return stages[-1]

    yield start
    for stage in stages:
        stage.close()


def settled(stage):
    """Have the device threads end, so that they hold nothing."""
    stage.close = lambda: None
    stage._queue.close()
    for worker in stage._workers:
        worker.join()


def lent(arena):
    with arena._changed:
        while arena._returned:
            arena._merge(*arena._returned.popleft())
        return arena._pinned_bytes() - sum(end - start for start, end in arena._free)


def overflows(results):
    return REGISTRY.get_sample_value('vico:pinned_memory_overflows_total', {'results': results}) or 0


def job(image, max_tiles=12):
    """What a request for this image becomes; the tiny checkpoint allows 12 tiles."""
    return ImageJob(image, Tiling(1, max_tiles).grid(image.size))


def ask(stage, picture, compression='auto', max_tiles=12):
    [image] = stage.submit([job(picture, max_tiles)], compression).result(HANG)
    return image.tokens


@pytest.mark.parametrize('cache_bytes', [0, 20 * TILE, 2**25])
def test_all_is_pinned_at_the_start_and_results_are_the_same_bits(start, encoder, expect, pictures, cuda, cache_bytes):
    stage = start(cache_bytes=cache_bytes)
    before = [overflows(results) for results in ('tiles', 'prompts')]
    for thread in (stage._memory._tiles._thread, stage._memory._rows._thread):
        thread.join()
    tiles = sum(block_sizes(cache_bytes // TILE + 4 + 64, TILE))
    rows = 2 * 8 * 2 * 256 * encoder.config.llm_hidden_size * 4
    assert sum(cuda.pinned[PINNED_BY_A_DEVICE:]) == tiles + rows
    pinned = len(cuda.pinned)
    for name in ('coffee', 'page', 'coffee', 'astronaut'):
        for compression in ('auto', 'none'):
            expected = expect(name, compression)
            tokens = ask(stage, pictures[name], compression)
            assert tokens.tile_tokens == expected.tile_tokens and tokens.scores == expected.scores
            assert torch.equal(tokens.embeddings, expected.embeddings)
            assert stage._memory._rows.owns(tokens.embeddings)
    assert len(cuda.pinned) == pinned
    assert [overflows(results) for results in ('tiles', 'prompts')] == before
    del tokens
    settled(stage)
    assert lent(stage._memory._tiles) == stage._cache._bytes <= cache_bytes
    assert lent(stage._memory._rows) == 0


def test_devices_share_the_memory(start, expect, pictures, cuda):
    stage = start(devices=2, cache_bytes=2**24)
    names = ('coffee', 'page', 'rocket', 'chelsea')
    futures = [stage.submit([job(pictures[name])], 'auto') for name in names]
    for name, future in zip(names, futures, strict=True):
        expected = expect(name)
        assert torch.equal(future.result(HANG)[0].tokens.embeddings, expected.embeddings)
    tiles, rows = stage._memory._tiles, stage._memory._rows
    pinned = sum(cuda.pinned[2 * PINNED_BY_A_DEVICE :])
    assert pinned == tiles._pinned_bytes() + rows._pinned_bytes()
    assert {one._batches.memory for one in stage._encoders} == {stage._memory}


def test_kept_tiles_that_no_prompt_holds_make_room(cuda, monkeypatch):
    monkeypatch.setattr(memory, 'WAITING_TILES', 0)
    config = SimpleNamespace(vision=SimpleNamespace(hidden_size=WIDTH), llm_hidden_size=64)
    one = SimpleNamespace(config=config, dtype=torch.float32, tile_batch=1, device=torch.device('cuda:0'))
    cache = TileCache(4 * TILE)
    lending = StageMemory([one], torch.float32, cache)
    tiles = cache.get([name.encode() for name in 'abcdef'], np.zeros((6, 448, 448, 3), np.uint8))
    addresses = {}
    for tile in tiles:
        [tile.patches] = lending.tiles(1)
        addresses[tile.digest.decode()] = tile.patches.data_ptr()
        cache.keep(tile)  # in the end c, d, e and f are
    held, before = tiles[:3], overflows('tiles')
    del tile, tiles
    taken = lending.tiles(2)
    assert [piece.data_ptr() for piece in taken] == [addresses['d'], addresses['e']]
    assert list(cache._kept) == [b'c', b'f'] and overflows('tiles') == before
    assert [piece is None for piece in lending.tiles(2)] == [False, True]
    assert list(cache._kept) == [b'c'] and overflows('tiles') == before + 1
    assert [tile.encoded for tile in held] == [True] * 3
    assert REGISTRY.get_sample_value('vico:embedding_cache_current_bytes') == TILE
    lending.close()


def test_what_finds_no_room_is_answered_counted_said_once_and_not_kept(start, expect, pictures, caplog):
    stage = start(waiting=0)  # room for the four tiles of two batches
    before = overflows('tiles')
    for name in ('coffee', 'rocket'):
        expected = expect(name)
        assert len(expected.tile_tokens) > 4
        assert torch.equal(ask(stage, pictures[name]).embeddings, expected.embeddings)
    assert overflows('tiles') > before
    assert caplog.text.count('pinned host memory for tiles is all in use') == 1
    assert 'a larger cache_bytes makes room' in caplog.text
    settled(stage)
    assert lent(stage._memory._tiles) == 0 and not stage._cache._kept


def test_visual_tokens_that_are_held_for_long_leave_others_their_own(start, expect, pictures, caplog):
    stage, before = start(), overflows('prompts')
    expected = expect('coffee', 'none')
    held = [ask(stage, pictures['coffee'], 'none') for _ in range(9)]  # seven tiles each; 32 have room
    assert overflows('prompts') - before == 5
    assert caplog.text.count('pinned host memory for prompts is all in use') == 1
    for tokens in held:
        assert torch.equal(tokens.embeddings, expected.embeddings)


def test_what_is_not_pinned_is_done_without(start, expect, pictures, cuda, caplog):
    cuda.room = 2**22
    stage = start(cache_bytes=2**26)
    expected = expect('coffee')
    assert torch.equal(ask(stage, pictures['coffee']).embeddings, expected.embeddings)
    assert 'lower the option cache_bytes' in caplog.text


@pytest.mark.parametrize('place', ['encode', 'project'])
def test_failed_prompts_leave_nothing_behind_though_their_errors_are_kept(start, pictures, monkeypatch, place):
    stage = start()
    errors = []

    def fail(*arguments):
        raise RuntimeError('device trouble')

    with monkeypatch.context() as failing:
        failing.setattr(stage._encoders[0].tower, place, fail)
        for _ in range(2):
            with pytest.raises(EncodingError, match='device trouble') as caught:
                ask(stage, pictures['coffee'])
            errors.append(caught.value)
    settled(stage)
    assert len(errors) == 2
    assert lent(stage._memory._tiles) == lent(stage._memory._rows) == 0


@pytest.mark.parametrize('fails', [False, True])
def test_the_host_waits_for_copies_before_memory_comes_back(start, pictures, monkeypatch, fails):
    stage, seen = start(), []
    encoder, arenas = stage._encoders[0], (stage._memory._tiles, stage._memory._rows)

    def fail(*arguments):
        raise RuntimeError('device trouble')

    if fails:
        monkeypatch.setattr(encoder.tower, 'project', fail)
    monkeypatch.setattr(
        type(encoder.projection.stream), 'synchronize', lambda stream: seen.append([stream, *map(lent, arenas)])
    )
    future = stage.submit([job(pictures['coffee'])], 'none')
    assert bool(future.exception(HANG)) == fails
    tiles = 7
    rows = tiles * 256 * encoder.config.llm_hidden_size * 4
    assert seen == [[encoder.projection.stream, tiles * TILE, rows]]


def test_cancelled_prompts_leave_nothing_behind(start, pictures, monkeypatch):
    stage = start()
    visual_tokens, futures = stage._encoders[0].visual_tokens, []

    def cancel(*arguments):
        futures[0].cancel()  # when its tiles have been encoded
        return visual_tokens(*arguments)

    monkeypatch.setattr(stage._encoders[0], 'visual_tokens', cancel)
    futures.append(stage.submit([job(pictures['coffee'])], 'auto'))
    ask(stage, pictures['page'])
    assert futures[0].cancelled()
    settled(stage)
    assert lent(stage._memory._tiles) == lent(stage._memory._rows) == 0


def blocks_left_by_closing(stage, monkeypatch):
    """Whether each pinned block, of tiles and of prompts, is still there when PyTorch is told to give memory back."""
    stage._prepare.shutdown()  # a thread that has just cut an image may still hold its tiles
    blocks, left = [], []
    for arena in (stage._memory._tiles, stage._memory._rows):
        arena._thread.join()
        blocks.append([weakref.ref(block) for block in arena._blocks])
    monkeypatch.setattr(
        *(torch.accelerator, 'empty_host_cache'),
        lambda: left.append([[block() is not None for block in some] for some in blocks]),
    )
    stage.close()
    [(tiles, rows)] = left
    assert tiles and rows
    return tiles, rows


def test_closing_gives_the_memory_back(start, pictures, monkeypatch):
    stage = start(cache_bytes=2**24)
    ask(stage, pictures['astronaut'], max_tiles=1)
    assert stage._cache._kept
    tiles, rows = blocks_left_by_closing(stage, monkeypatch)
    assert not any(tiles) and not any(rows)
    assert stage._encoders[0].projection.memory is None and stage._encoders[0]._batches.memory is None
    assert REGISTRY.get_sample_value('vico:embedding_cache_current_bytes') == 0


def test_closing_gives_back_the_tiles_of_prompts_that_wait(start, pictures, monkeypatch):
    stage = start(cache_bytes=2**24)
    ask(stage, pictures['astronaut'], max_tiles=1)
    cut, known = stage._cut, threading.Event()

    def cut_first_only(prompt, index, one):
        if index == 0:
            cut(prompt, index, one)
            known.set()

    monkeypatch.setattr(stage, '_cut', cut_first_only)
    future = stage.submit([job(pictures['astronaut'], 1), job(pictures['page'])], 'auto')
    assert known.wait(HANG)
    tiles, _ = blocks_left_by_closing(stage, monkeypatch)
    assert future.cancelled() and not any(tiles)


def test_what_is_handed_on_outlives_the_stage(start, pictures, monkeypatch):
    stage = start()
    tokens = ask(stage, pictures['astronaut'], max_tiles=1)
    expected = tokens.embeddings.clone()
    tiles, rows = blocks_left_by_closing(stage, monkeypatch)
    assert not any(tiles) and any(rows)
    assert len(VisionEncoder(stage._encoders[0]).encode([pictures['coffee']])) == 1 and torch.equal(
        tokens.embeddings, expected
    )


@pytest.mark.parametrize('devices', [1, 8])
def test_sizes_of_a_wide_vit(cuda, monkeypatch, devices):
    """As they are asked for; nothing is pinned."""
    taken = []
    monkeypatch.setattr(memory, 'PinnedArena', lambda *arguments: taken.append(arguments))
    config = SimpleNamespace(vision=SimpleNamespace(hidden_size=3200), llm_hidden_size=4096)
    one = SimpleNamespace(config=config, dtype=torch.bfloat16, tile_batch=2, device=torch.device('cuda:1'))
    StageMemory([one] * devices, torch.bfloat16, TileCache(4 * 2**30))
    tile, rows = 1024 * 3200 * 2, 256 * 4096 * 2
    assert taken == [
        (655 + 4 * devices + 64, tile, torch.device('cuda:1'), 'tiles'),
        (32 * devices, rows, torch.device('cuda:1'), 'prompts'),
    ]
