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
    queue.put(prompt(4), admission)  # another choice of the same request
    queue.release(admission)
    with pytest.raises(StageBusyError, match='14 tiles are waiting'):
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


def test_another_device_has_the_second_try():
    queue, one = TileQueue(10, devices=2), prompt(1)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    taken = queue.take(9, wait=False, device=1)
    assert queue.give_back(taken, RuntimeError('once'), device=1) == []
    assert queue.take(9, wait=False, device=1) == []
    assert queue.take(9, wait=False, device=0) == taken


def test_a_retired_device_takes_nothing_and_what_it_failed_on_is_taken_by_the_last_one():
    queue, one = TileQueue(10, devices=2), prompt(1)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    taken = queue.take(9, wait=False, device=1)
    assert queue.retire(0) and not queue.retire(0) and not queue.retire(1)
    assert queue.give_back(taken, RuntimeError('once'), device=1) == []
    assert not queue.serves(0) and queue.take(9, wait=True, device=0) == []
    assert queue.take(9, wait=False, device=1) == taken


def test_an_image_with_a_tile_that_was_given_up():
    queue, one = TileQueue(10), prompt(1)
    queue.put(one)
    its = tiles('a')
    its[0].error = RuntimeError('device trouble')
    assert queue.cut(one, 0, its) is its[0].error
    assert queue.take(9, wait=False) == []


def test_nothing_is_taken_accepted_or_waited_for_after_close():
    queue, one = TileQueue(10), prompt(1)
    admission = queue.admit(1)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    assert queue.close() == [one] and not queue.serves(0)
    assert queue.take(9, wait=True) == []
    for refused in (lambda: queue.put(prompt(1), admission), lambda: queue.admit(1)):
        with pytest.raises(StageBusyError, match='shutting down'):
            refused()


def test_a_closed_queue_says_why():
    queue = TileQueue(10)
    queue.close('Out of order.')
    with pytest.raises(StageBusyError, match='Out of order'):
        queue.admit(1)


def test_what_is_given_up_does_not_wait():
    queue, one = TileQueue(1), prompt(1)
    queue.put(one)
    queue.cut(one, 0, tiles('a'))
    assert queue.give_up() == [one]
    assert queue.take(9, wait=False) == []
    queue.put(prompt(1))


def test_a_tile_that_a_prompt_shows_twice_is_taken_once():
    queue, one = TileQueue(10), prompt(2)
    [tile] = tiles('a')
    queue.put(one)
    queue.cut(one, 0, [tile, tile])
    assert queue.take(9, wait=False) == [tile]


def test_no_tile_is_lost_when_taking_fails(monkeypatch):
    queue, one, other = TileQueue(10), prompt(1), prompt(1)
    for each, its in ((one, tiles('a')), (other, tiles('b'))):
        queue.put(each)
        queue.cut(each, 0, its)
    with monkeypatch.context() as patch:

        def fail(prompt):
            if prompt is other:
                raise MemoryError

        patch.setattr(queue, '_begin', fail)
        with pytest.raises(MemoryError):
            queue.take(9, wait=False)
    assert names(queue.take(9, wait=False)) == 'ab'
