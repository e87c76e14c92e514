"""The arrows between all files: no cycle, and those to the kernels and to LMDeploy only from where they belong."""

import importlib
import re
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from house.imports import ROOT, arrows, graph, imported, modules

KERNELS = 'lmdeploy_vico.kernels.'
# Rooms that may use kernels. Options know the names of the implementations and nothing else of them.
USERS_OF_KERNELS = (
    'lmdeploy_vico.vision.',
    'lmdeploy_vico.adapter.',
    'lmdeploy_vico.training.',
    'lmdeploy_vico.reader.',
)
DOCUMENT = ROOT / 'docs' / 'architecture.md'
USERS_OF_LMDEPLOY = ('lmdeploy_vico.adapter', 'lmdeploy_vico.cpu')


@pytest.fixture(scope='module')
def files():
    return modules()


@pytest.fixture(scope='module')
def house(files):
    return graph(files)


def is_ours(name):
    return name.split('.')[0] == 'lmdeploy_vico'


def test_no_import_cycle(house):
    try:
        TopologicalSorter(house).prepare()
    except CycleError as error:
        pytest.fail('a cycle of imports: ' + ' <- '.join(error.args[1]))


def test_kernels_know_nothing_above_them(house):
    above = {name: targets for name, targets in house.items() if name.startswith(KERNELS)}
    assert above
    for name, targets in above.items():
        assert all(target.startswith(KERNELS) for target in targets), name


def test_kernels_are_used_by_the_rooms_that_compute(house):
    others = [name for name in house if is_ours(name) and not name.startswith((*USERS_OF_KERNELS, KERNELS))]
    used = {(name, target) for name in others for target in house[name] if target.startswith(KERNELS)}
    assert used == {(f'lmdeploy_vico.{name}', f'{KERNELS}choice') for name in ('options', 'option_kinds')}


def test_only_two_rooms_import_lmdeploy(files):
    users = {
        name
        for name, path in files.items()
        if is_ours(name) and any(one.split('.')[0] == 'lmdeploy' for one in imported(path.read_text(), name))
    }
    assert users
    assert {name for name in users if not name.startswith(USERS_OF_LMDEPLOY)} == set()


def test_the_package_does_not_import_benchmarks_or_tests(house):
    for name, targets in house.items():
        if is_ours(name):
            assert all(is_ours(target) for target in targets), name


def test_the_table_of_rooms_says_what_import_linter_checks():
    toml = importlib.import_module('tomllib' if sys.version_info >= (3, 11) else 'tomli')
    contracts = toml.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']['contracts']
    [layers] = [one['layers'] for one in contracts if one['type'] == 'layers']
    levels = {room: level for level, rooms in enumerate(reversed(layers), 1) for room in rooms.split(' | ')}
    forbidden = {
        (room, target)
        for contract in contracts
        if contract['type'] == 'forbidden'
        for room in contract['source_modules']
        for target in contract['forbidden_modules']
        if any(f'{other}.'.startswith(f'{target}.') and levels[other] < levels[room] for other in levels)
    }
    described, excepted = {}, set()
    for level, rooms, exceptions in re.findall(r'^\| (\d+) \| (.*?) \| .* \|(.*?)\|$', DOCUMENT.read_text(), re.M):
        for room in re.findall(r'`(.*?)`', rooms):
            name = room.removesuffix('.py').strip('/').replace('/', '.')
            described[name] = int(level)
            excepted |= {(name, f'lmdeploy_vico.{target}') for target in re.findall(r'`(.*?)`', exceptions)}
    assert described == levels
    assert excepted == forbidden


KNOWN = ('a', 'a.b', 'a.b.c', 'a.d')


@pytest.mark.parametrize(
    'source, targets',
    [
        ('import a.b.c', {'a.b.c'}),
        ('from a.b import c', {'a.b.c'}),
        ('from a.b import function', {'a.b'}),
        ('from a.b.c import one, two', {'a.b.c'}),
        ('from . import b', {'a.b'}),
        ('from .b import c', {'a.b.c'}),
        ('from .. import anything', set()),
        ('import os, torch.nn', set()),
        ('import a.d', set()),
        ('def later():\n    from a import b', {'a.b'}),
        ('if TYPE_CHECKING:\n    import a.b\nelse:\n    import a.b.c', {'a.b.c'}),
        ('import typing\nif typing.TYPE_CHECKING:\n    import a.b', set()),
        ('if not TYPE_CHECKING:\n    import a.b', {'a.b'}),
        ('try:\n    import a.b\nexcept ImportError:\n    pass', {'a.b'}),
    ],
)
def test_what_counts_as_an_arrow(source, targets):
    assert arrows(source, 'a.d', KNOWN) == targets


def test_a_packages_own_file_is_its_package():
    assert arrows('from .b import c', 'a', KNOWN, is_package=True) == {'a.b.c'}


def test_a_cycle_through_a_function_is_found(tmp_path):
    for name, source in (('one', 'from lmdeploy_vico import two'), ('two', 'def f():\n    import lmdeploy_vico.one')):
        (tmp_path / 'lmdeploy_vico').mkdir(exist_ok=True)
        (tmp_path / 'lmdeploy_vico' / f'{name}.py').write_text(source)
    with pytest.raises(CycleError):
        TopologicalSorter(graph(modules(tmp_path))).prepare()
