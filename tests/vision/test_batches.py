"""The batches for CUDA devices, on a CPU with stand-ins for streams and events that do everything at once."""

import gc
import threading

import numpy as np
import pytest
import torch
from waiting import HANG

from lmdeploy_vico.vision.arena import PinnedArena
from lmdeploy_vico.vision.batches import CpuBatches, CudaBatches, _capturing
from lmdeploy_vico.vision.tile_encoder import TileEncoder

CPU = torch.device('cpu')


@pytest.fixture
def encoder(make_checkpoint):
    return TileEncoder.from_pretrained(make_checkpoint())


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Memory:
    """Lends a tile's memory out of ``left``, and has none beyond."""

    def __init__(self, left, width):
        self.left = [torch.zeros(1024, width) for _ in range(left)]
        self.lent = []

    def tiles(self, count):
        places = [self.left.pop() if self.left else None for _ in range(count)]
        self.lent += [place for place in places if place is not None]
        return places


def expect(features, expected):
    assert torch.equal(features.scores, expected.scores)
    assert len(features.patches) == len(expected.patches)
    assert all(map(torch.equal, features.patches, expected.patches))


@pytest.mark.parametrize('lent', [None, 0, 3, 99])
def test_two_batches_at_a_time(encoder, rng, cuda, lent):
    tiles = list(rng.integers(0, 256, (6, 448, 448, 3), dtype=np.uint8))
    groups = [tiles[:3], tiles[3:4], tiles[4:], tiles[:1]]
    expected = [CpuBatches(encoder.tower, 3).start(group).wait() for group in groups]
    batches = CudaBatches(encoder.tower, 3, CPU, graph=False)
    pinned = len(cuda.pinned)
    memory = batches.memory = None if lent is None else Memory(lent, encoder.config.vision.hidden_size)
    running, results = batches.start(groups[0]), []
    for index in range(len(groups)):
        following = batches.start(groups[index + 1]) if index + 1 < len(groups) else None
        results.append(running.wait())
        assert running.seconds == 0.0125
        running = following
    for features, wanted in zip(results, expected, strict=True):
        expect(features, wanted)  # later batches have not written there
    if memory:
        rows = [row.data_ptr() for features in results for row in features.patches]
        assert [place.data_ptr() for place in memory.lent] == rows[: len(memory.lent)]
    assert len(cuda.pinned) == pinned == 6  # for each of two: tiles, patches and scores


@pytest.fixture
def lending(encoder, cuda):
    """``(batches, arena)``: batches of one tile, and room for the patches of two."""
    batches = CudaBatches(encoder.tower, 1, CPU, graph=False)
    shape = (1024, encoder.config.vision.hidden_size)
    arena = PinnedArena(2, 4 * shape[0] * shape[1], CPU, 'tiles')

    class Memory:
        def tiles(self, count):
            return [arena.take(shape, torch.float32) for _ in range(count)]

    batches.memory = Memory()
    yield batches, arena
    arena.close()


TILE = [np.zeros((448, 448, 3), np.uint8)]


def test_memory_comes_back_when_the_host_knows_that_the_copy_to_it_has_ended(lending, monkeypatch):
    batches, arena = lending
    slots = [next(batches._slots) for _ in range(2)]
    pending, take = [], arena.take

    def record(shape, dtype):
        pending.append([slot.copied.pending for slot in slots])
        return take(shape, dtype)

    monkeypatch.setattr(arena, 'take', record)
    first, second = batches.start(TILE), batches.start(TILE)
    places = [slot.places[0].data_ptr() for slot in slots]
    del first, second  # nobody waits for them, and nobody has their results
    assert take((1,), torch.uint8) is None
    for index in (0, 1):
        batches.start(TILE)
        assert slots[index].places[0].data_ptr() == places[index]
    assert pending == [[False, False], [True, False], [False, True], [True, False]]
    batches.start(TILE).wait()
    assert take((1,), torch.uint8) is not None


def test_a_launch_that_fails_gives_back_after_both_streams_have_been_waited_for(lending, encoder, cuda, monkeypatch):
    batches, arena = lending
    waited = []
    slot = next(batches._slots)
    next(batches._slots)
    slot.scores = torch.zeros(3)  # cannot be copied to, after the patches have been
    synchronize = type(batches._stream).synchronize

    def record(stream):
        waited.append((stream, len(slot.places)))
        synchronize(stream)

    monkeypatch.setattr(type(batches._stream), 'synchronize', record)
    with pytest.raises(RuntimeError):
        batches.start(TILE)
    assert waited == [(batches._stream, 1), (batches._copies, 1)]
    assert not slot.places
    shape = (2, 1024, encoder.config.vision.hidden_size)
    assert arena.take(shape, torch.float32) is not None


def encoding(monkeypatch, cuda, encoder):
    encode = encoder.tower.encode

    def record(tiles):
        cuda.note('encode')
        return encode(tiles)

    monkeypatch.setattr(encoder.tower, 'encode', record)


def test_a_capture_follows_a_run_and_bears_other_threads_allocations(encoder, cuda, monkeypatch):
    encoding(monkeypatch, cuda, encoder)

    device = torch.device('cuda:1')
    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device, **options: zeros(*shape, **options))
    CudaBatches(encoder.tower, 1, device, graph=True)
    assert cuda.calls == [
        ('encode', 'cuda:1'),
        ('synchronize', 'cuda:1'),
        ('capture', 'thread_local', False, 'cuda:1'),  # no garbage is collected meanwhile
        ('encode', 'cuda:1'),
        ('captured', 'cuda:1'),
    ]
    assert gc.isenabled()


@pytest.mark.parametrize('graph', [False, True])
def test_a_capture_has_a_stream_on_which_nothing_has_run(encoder, cuda, monkeypatch, graph):
    """So that the workspace cuBLAS takes for it is the graph's, and outlives an engine in the same process."""
    streams, encode = [], encoder.tower.encode

    def record(tiles):
        streams.append(cuda.current_stream)
        return encode(tiles)

    monkeypatch.setattr(encoder.tower, 'encode', record)
    batches = CudaBatches(encoder.tower, 1, CPU, graph)
    assert [stream is batches._stream for stream in streams] == ([False, True] if graph else [True])
    assert None not in streams


def test_a_capture_that_fails_names_the_way_out(encoder, cuda, monkeypatch):
    outcomes = iter([None, RuntimeError('operation not permitted when stream is capturing')])
    encode = encoder.tower.encode

    def fail(tiles):
        if (error := next(outcomes)) is not None:
            raise error
        return encode(tiles)

    monkeypatch.setattr(encoder.tower, 'encode', fail)
    with pytest.raises(RuntimeError, match='cpu: .* could not be captured; --eager-mode .*not permitted when'):
        CudaBatches(encoder.tower, 1, CPU, graph=True)
    assert gc.isenabled() and not _capturing.locked()


@pytest.mark.busy
def test_replicas_capture_one_after_the_other(make_checkpoint, cuda, monkeypatch):
    replicas = [TileEncoder.from_pretrained(make_checkpoint()) for _ in range(2)]
    for replica in replicas:
        encoding(monkeypatch, cuda, replica)
    barrier = threading.Barrier(2, timeout=HANG)

    def load(replica):
        barrier.wait()
        CudaBatches(replica.tower, 1, CPU, graph=True)

    threads = [threading.Thread(target=load, args=[replica]) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    captures = [call[0] for call in cuda.calls if call[0] in ('capture', 'captured')]
    assert captures == ['capture', 'captured'] * 2
