"""The hostile bodies are many, and the same every time."""

from faults.bodies import KEYS, VALUES, hostile_bodies


def test_a_seed_gives_the_same_bodies():
    assert list(hostile_bodies('m', 200, seed=3)) == list(hostile_bodies('m', 200, seed=3))
    assert list(hostile_bodies('m', 200, seed=3)) != list(hostile_bodies('m', 200, seed=4))


def test_every_key_meets_every_value():
    count = len(KEYS) * len(VALUES)
    assert len({name for name, _ in hostile_bodies('m', count, seed=1)}) == count
