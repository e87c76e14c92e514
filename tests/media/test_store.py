"""Images and videos by the ids of clients: found by who sent them, replaced, and dropped in time."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.store import ENTRY, MediaStore


def test_only_who_sent_it_finds_it():
    store = MediaStore(10 * ENTRY)
    store.put('a', 'cat', b'meow')
    store.put('b', 'cat', b'purr')
    assert (store.get('a', 'cat'), store.get('b', 'cat')) == (b'meow', b'purr')
    assert store.get('c', 'cat') is None and store.get('a', 'dog') is None and store.get('', 'cat') is None


def test_the_last_one_counts():
    store = MediaStore(10 * ENTRY)
    store.put('a', 'cat', b'meow')
    store.put('a', 'cat', b'purring')
    assert store.recall('a', 'cat') == b'purring' and store.taken == ENTRY + len(b'purring')


def test_what_was_not_used_for_longest_is_dropped():
    store = MediaStore(3 * (ENTRY + 10))
    for name in 'xyz':
        store.put('a', name, bytes(10))
    store.get('a', 'x')
    store.put('b', 'w', bytes(10))
    assert [name for name in 'xyz' if store.get('a', name)] == ['x', 'z']
    store.put('b', 'large', bytes(2 * ENTRY))
    assert store.get('a', 'x') is None and store.taken <= store.capacity


def test_what_is_too_large_is_not_kept_and_replaces_all_the_same():
    store = MediaStore(2 * ENTRY)
    store.put('a', 'cat', b'meow')
    store.put('a', 'cat', bytes(2 * ENTRY))
    assert store.get('a', 'cat') is None and store.taken == 0


def test_many_small_ones_are_counted_too():
    store = MediaStore(4 * ENTRY)
    for number in range(100):
        store.put('a', str(number), b'')
    assert sum(store.get('a', str(number)) is not None for number in range(100)) == 4


def test_nothing_is_kept_without_room():
    store = MediaStore(0)
    store.put('a', 'cat', b'')
    with pytest.raises(MediaError, match="No image or video is kept as uuid 'cat', or no longer: send it with its"):
        store.recall('a', 'cat')


def test_a_long_id_is_not_repeated():
    with pytest.raises(MediaError) as caught:
        MediaStore(0).recall('a', 'x' * 256)
    assert len(str(caught.value)) < 250


def test_many_threads():
    store = MediaStore(20 * (ENTRY + 8))

    def use(number):
        name = str(number % 30)
        store.put('a', name, name.encode().rjust(8))
        found = store.get('a', name)
        return found is None or found.strip().decode() == name

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(3000)))
    assert store.taken == 20 * (ENTRY + 8)
