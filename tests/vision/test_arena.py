"""Pinned memory that is lent: exact, never twice, and back as soon as nobody has it."""

import gc
import threading

import numpy as np
import pytest
import torch

from lmdeploy_vico.vision.arena import LARGEST_BLOCK, PinnedArena, block_sizes

CPU = torch.device('cpu')
PIECE = 1024  # bytes

pytestmark = pytest.mark.busy


@pytest.fixture
def arena(cuda):
    """With room for four pieces."""
    arena = PinnedArena(4, PIECE, CPU, 'tiles')
    yield arena
    arena.close()


def take_all(arena, values=PIECE):
    pieces = []
    while (piece := arena.take((values,), torch.uint8)) is not None:
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize('width', [64, 1024, 3200])
@pytest.mark.parametrize('count', [1, 3, 80, 723, 2128])
def test_blocks_are_powers_of_two_and_full(width, count):
    piece = 1024 * width * 2
    sizes = list(block_sizes(count, piece))
    assert all(size & (size - 1) == 0 and size <= LARGEST_BLOCK for size in sizes)
    assert sum(size // piece for size in sizes) == count
    assert sum(sizes) - count * piece < len(sizes) * piece
    if width == 3200 and count > 700:
        assert sum(sizes) <= 1.01 * count * piece


def test_pinned_once_whatever_is_taken(arena, cuda):
    for _ in range(3):
        assert len(take_all(arena)) == 4
    assert cuda.pinned == [4 * PIECE]


def test_pieces_do_not_overlap_and_are_aligned(arena):
    pieces = [arena.take((size,), torch.uint8) for size in (1000, 1, 257, 2000)]
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    for index, piece in enumerate(pieces):
        assert (piece == index).all()
        assert (piece.data_ptr() - pieces[0].data_ptr()) % 256 == 0 and arena.owns(piece)
    assert not arena.owns(torch.zeros(4))


def test_any_shape_and_dtype(arena):
    piece = arena.take((4, 8), torch.bfloat16)
    assert piece.shape == (4, 8) and piece.dtype == torch.bfloat16 and piece.is_contiguous()
    assert piece.untyped_storage().nbytes() == 64


def test_comes_back_with_the_last_view(arena):
    pieces = take_all(arena)
    row, address = pieces[1].view(torch.float32).view(4, -1)[2:3], pieces[1].data_ptr()
    del pieces[1]
    assert arena.take((PIECE,), torch.uint8) is None
    del row
    assert arena.take((PIECE,), torch.uint8).data_ptr() == address


def test_neighbours_that_have_come_back_are_one(arena):
    pieces = take_all(arena)
    assert arena.take((3 * PIECE,), torch.uint8) is None
    for index in (2, 0, 1):
        pieces[index] = None
    assert arena.take((3 * PIECE,), torch.uint8) is not None


def test_a_garbage_collection_in_the_midst_of_it_gives_back(arena, monkeypatch):
    cycle = [take_all(arena)]
    cycle.append(cycle)
    find = arena._find

    def collect(size):
        gc.collect()  # while the lock is held
        return find(size)

    monkeypatch.setattr(arena, '_find', collect)
    del cycle
    assert len(take_all(arena)) == 4


def test_waits_rather_than_find_no_room_while_memory_is_being_pinned(cuda):
    pinning, waited = threading.Event(), []
    cuda.pinning = pinning.wait
    arena = PinnedArena(1, PIECE, CPU, 'tiles')
    wait = arena._changed.wait

    def release():
        waited.append(True)
        pinning.set()
        return wait()

    arena._changed.wait = release
    assert arena.take((PIECE,), torch.uint8) is not None
    assert waited
    arena.close()


def test_in_the_context_of_the_device(cuda):
    devices = []
    cuda.pinning = lambda: devices.append(str(cuda.device))
    arena = PinnedArena(1, PIECE, torch.device('cuda:1'), 'tiles')
    arena._thread.join()  # closed earlier, it would pin nothing
    arena.close()
    assert devices == ['cuda:1']


def test_what_cannot_be_pinned_is_said_and_done_without(cuda, caplog):
    cuda.room = 2 * PIECE
    arena = PinnedArena(3, PIECE, CPU, 'tiles')
    assert len(take_all(arena)) == 2
    assert 'GiB of host memory could be pinned for tiles' in caplog.text and 'option cache_bytes' in caplog.text
    arena.close()


@pytest.mark.parametrize('largest', [1, 2, 3, 4, 15])
def test_where_large_blocks_are_refused_smaller_ones_make_up_for_them(cuda, caplog, largest):
    cuda.largest = largest * PIECE
    arena = PinnedArena(19, PIECE, CPU, 'tiles')
    assert len(take_all(arena)) == 19
    size = 1 << (largest.bit_length() - 1)
    assert cuda.pinned[: 19 // size] == [size * PIECE] * (19 // size) and sum(cuda.pinned) == 19 * PIECE
    tried = [one * PIECE for one in (16, 8, 4, 2) if one > size]
    assert cuda.refused == tried
    assert 'could be pinned' not in caplog.text
    arena.close()


def test_a_host_that_refuses_a_block_gives_what_it_has(cuda, caplog):
    """Of the room for 27 pieces, blocks of 16, 8, 2 and 1 fill all."""
    cuda.room = 27 * PIECE
    arena = PinnedArena(100, PIECE, CPU, 'tiles')
    assert len(take_all(arena)) == 27
    assert cuda.pinned == [16 * PIECE, 8 * PIECE, 2 * PIECE, PIECE]
    assert cuda.refused == [size * PIECE for size in (64, 32, 16, 8, 4, 2, 1)]
    assert 'option cache_bytes' in caplog.text
    arena.close()


@pytest.mark.parametrize('piece', [PIECE, 3 * PIECE])
def test_gives_up_when_not_even_a_piece_can_be_pinned(cuda, caplog, piece):
    cuda.room = 0
    arena = PinnedArena(8, piece, CPU, 'tiles')
    assert arena.take((piece,), torch.uint8) is None
    assert min(cuda.refused) == 1 << (piece - 1).bit_length() and len(cuda.refused) == len(set(cuda.refused))
    assert 'only 0.00 GiB of host memory could be pinned for tiles' in caplog.text
    arena.close()


def test_after_closing_what_is_lent_stays_and_nothing_more_is(arena):
    piece = arena.take((PIECE,), torch.uint8).fill_(7)
    arena.close()
    assert arena.take((1,), torch.uint8) is None
    assert (piece == 7).all()


def test_many_threads(cuda):
    arena = PinnedArena(16, PIECE, CPU, 'tiles')
    errors = []

    def work(seed):
        rng, held = np.random.default_rng(seed), []
        try:
            for _ in range(300):
                piece = arena.take((int(rng.integers(1, 3 * PIECE)),), torch.uint8)
                if piece is not None:
                    held.append(piece.fill_(seed))
                if held and (piece is None or rng.integers(2)):
                    assert (held.pop(rng.integers(len(held))) == seed).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert arena.take((16 * PIECE,), torch.uint8) is not None
    arena.close()
