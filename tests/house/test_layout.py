"""Sizes: files that can be read in one go, and folders that can be looked over."""

from collections import Counter

import pytest
from house.imports import ROOT, modules

LONGEST_FILE = 400  # lines
LARGEST_FOLDER = 12  # Python files
# A second implementation of the whole model, which is read beside the model's description, from top to bottom.
LONG = {'tests/parity/reference.py'}


@pytest.fixture(scope='module')
def files():
    """The Python files, by their path in the repository."""
    return {path.relative_to(ROOT).as_posix(): path for path in modules().values()}


def test_no_file_is_long(files):
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items() if name not in LONG}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_what_may_be_long_is_there(files):
    assert set(files) >= LONG


def test_no_folder_is_crowded(files):
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in files.values())
    assert {folder: count for folder, count in folders.items() if count > LARGEST_FOLDER} == {}


def test_every_room_says_what_it_is_for(files):
    """The linter asks for the docstring; a folder without ``__init__.py`` would have none."""
    rooms = {path.parent for name, path in files.items() if name.startswith(('lmdeploy_vico/', 'benchmarks/'))}
    assert {room.relative_to(ROOT).as_posix() for room in rooms if not (room / '__init__.py').is_file()} == set()
