"""The broken pictures are many, and the same every time."""

import pytest
from PIL import Image

from faults.mutations import MUTATIONS, mutated, originals


@pytest.fixture(scope='module')
def files():
    return originals(Image.linear_gradient('L').resize((32, 24)).convert('RGB'))


def test_the_usual_formats_are_written(files):
    assert {'PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'ICO', 'TGA', 'PPM'} <= set(files)


def test_a_seed_gives_the_same_pictures(files):
    assert list(mutated(files, 200, seed=3)) == list(mutated(files, 200, seed=3))
    assert list(mutated(files, 200, seed=3)) != list(mutated(files, 200, seed=4))


def test_every_format_meets_every_mutation(files):
    names = [name.rsplit(' ', 1)[0] for name, _ in mutated(files, len(files) * len(MUTATIONS), seed=1)]
    assert len(set(names)) == len(files) * len(MUTATIONS)


def test_most_mutations_change_the_file(files):
    changed = [data != files[name.split(' ')[0]] for name, data in mutated(files, 300, seed=2)]
    assert sum(changed) > 270
