import pytest

from lmdeploy_vico.stage.queue import PendingPrompt, StageBusyError, TileQueue
from lmdeploy_vico.stage.tiles import Tile


def prompt(size, images=1):
    return PendingPrompt(images=[None] * images, groups=[], size=size)


def tiles(*names):
    return [Tile(name.encode(), None) for name in names]


def names(taken):
    return ''.join(tile.digest.decode() for tile in taken)


def test_oldest_first_over_several_batches():
    queue = TileQueue(100)
    prompts = [prompt(3), prompt(1), prompt(2)]
    for one in prompts:
        queue.put(one)
    queue.cut(prompts[2], 0, tiles('f', 'g'))
    queue.cut(prompts[1], 0, tiles('e'))
    assert names(queue.take(2, wait=False)) == 'ef'  # the oldest one is not cut yet
    queue.cut(prompts[0], 0, tiles('a', 'b', 'c'))
    assert names(queue.take(2, wait=False)) == 'ab'
    assert names(queue.take(9, wait=False)) == 'cg'
    assert queue.take(9, wait=False) == []


def test_images_of_a_prompt_in_the_order_in_which_they_are_cut():
    queue, one = TileQueue(100), prompt(3, images=2)
    queue.put(one)
    queue.cut(one, 1, tiles('b', 'c'))
    assert names(queue.take(9, wait=False)) == 'bc'
    queue.cut(one, 0, tiles('a'))
    assert names(queue.take(9, wait=False)) == 'a'


def test_a_shared_tile_is_taken_once_and_completes_both():
    queue, first, second = TileQueue(100), prompt(1), prompt(1)
    shared = tiles('a')
    for one in (first, second):
        queue.put(one)
        queue.cut(one, 0, shared)
    assert names(queue.take(9, wait=False)) == 'a'
    assert queue.pop_encoded() == []
    shared[0].patches = object()
    assert queue.pop_encoded() == [first, second]
    assert queue.pop_encoded() == []


def test_admission_holds_a_place_until_the_tiles_are_queued():
    queue = TileQueue(10)
    admission = queue.admit(6)
    with pytest.raises(StageBusyError, match='6 tiles are waiting .* and 5 more would exceed the limit of 10'):
        queue.admit(5)
    queue.put(prompt(9), admission)  # more than was thought: admitted is admitted
    with pytest.raises(StageBusyError, match='9 tiles are waiting'):
        queue.put(prompt(2))
    queue.put(prompt(1))
    queue.release(admission)  # does nothing any more
    with pytest.raises(StageBusyError, match='10 tiles are waiting'):
        queue.admit(1)


def test_a_place_given_back_is_free():
    queue = TileQueue(10)
    queue.release(queue.admit(10))
    queue.admit(10)


def test_more_than_the_limit_when_nothing_waits():
    queue = TileQueue(10)
    queue.admit(50)
    with pytest.raises(StageBusyError):
        queue.admit(1)


def test_no_limit():
    queue = TileQueue(None)
    for _ in range(100):
        queue.admit(1000)


def test_finished_prompts_leave():
    queue, one = TileQueue(10), prompt(10)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    one.future.cancel()
    assert queue.take(9, wait=False) == []
    queue.admit(10)


def test_given_back_once_then_given_up():
    queue, both, other = TileQueue(10), prompt(2), prompt(1)
    for one, its in ((both, tiles('a', 'b')), (other, tiles('c'))):
        queue.put(one)
        queue.cut(one, 0, its)
    taken = queue.take(2, wait=False)
    assert queue.give_back(taken, RuntimeError('once')) == []
    assert queue.take(2, wait=False) == taken
    assert queue.give_back(taken, RuntimeError('twice')) == [both]
    assert names(queue.take(9, wait=False)) == 'c'


def test_an_image_with_a_tile_that_was_given_up():
    queue, one = TileQueue(10), prompt(1)
    queue.put(one)
    its = tiles('a')
    its[0].error = RuntimeError('device trouble')
    with pytest.raises(RuntimeError, match='device trouble'):
        queue.cut(one, 0, its)


def test_nothing_is_taken_or_waited_for_after_close():
    queue, one = TileQueue(10), prompt(1)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    assert queue.close() == [one] and queue.closed
    assert queue.take(9, wait=True) == []
