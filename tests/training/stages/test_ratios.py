"""Loss ratios against an independent computation; each is computed once and kept."""

import io
import json

import numpy as np
import pytest
from parity.reference import Reference
from rich.console import Console
from training.independent import independent_logits, kl
from training.made import TILES

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.loop.folder import whole_lines
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.losses import Target
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.stages import ratios
from lmdeploy_vico.training.stages.plan import Plan, Tile
from lmdeploy_vico.training.stages.ratios import Losses, RatioFile, ratio, tile_losses

QUIET = Console(file=io.StringIO())


@pytest.fixture
def pair(dense):
    """A policy that is not the reference any more."""
    policy = dense.model()
    policy.mlp1[3].weight.data *= 1.1
    return Pair(policy, dense.model(), Processes())


@pytest.mark.parametrize('sample, tile', [(1, 0), (2, 3)])
def test_losses_are_what_an_independent_computation_says(dense, pair, sample, tile):
    given = dense.samples[sample]
    none = np.zeros(len(given.tiles), bool)
    losses = tile_losses(pair, given, tile, pair.target(lay_out([given], [none])), Processes())
    base, policy = Reference(dense.path), Reference(dense.path)
    policy.vision.mlp1[3].weight.data *= 1.1
    one = none.copy()
    one[tile] = True
    target = independent_logits(base, given, none)
    expected = [kl(target, independent_logits(policy, given, chosen)) for chosen in (none, one)]
    assert [losses.full, losses.compressed] == pytest.approx(expected, rel=1e-4)
    assert losses.full != pytest.approx(losses.compressed, rel=0.1)


def test_a_ratio_is_computed_once(dense, pair, tmp_path, monkeypatch):
    seen = []

    def counted(pair, sample, tile, target, processes):
        seen.append(Tile(TILES.index(len(sample.tiles)), tile))
        return Losses(1.0, 2.0 + tile)

    monkeypatch.setattr(ratios, 'tile_losses', counted)
    tiles = [Tile(1, 0), Tile(2, 3), Tile(1, 0)]
    file = RatioFile(tmp_path, 'ratios', dense.samples, Processes())
    assert file.missing(tiles) == [Tile(1, 0), Tile(2, 3)]
    file.compute(pair, tiles, 0, QUIET)
    assert seen == [Tile(1, 0), Tile(2, 3)]
    assert file.missing(tiles) == [] and file[Tile(2, 3)] == Losses(1.0, 5.0)
    again = RatioFile(tmp_path, 'ratios', dense.samples, Processes())
    again.compute(pair, [*tiles, Tile(0, 0)], 0, QUIET)
    assert seen[2:] == [Tile(0, 0)]


class Counting:
    """Targets, by the tiles of the samples that they are of."""

    def __init__(self):
        self.targets = []

    def target(self, batch):
        self.targets.append(len(batch.tiles))
        return Target(batch.tiles, batch.tiles)


class Two:
    """One of two processes, whose other one is not there."""

    size = 2

    def __init__(self, rank):
        self.rank, self.first = rank, rank == 0

    def wait(self):
        pass


@pytest.fixture
def by_target(monkeypatch):
    """Losses that say of which sample the target was, beside the sample's own number of tiles."""

    def losses(pair, sample, tile, target, processes):
        return Losses(len(target.hidden), len(sample.tiles))

    monkeypatch.setattr(ratios, 'tile_losses', losses)


MIXED = [Tile(2, 3), Tile(1, 0), Tile(2, 0), Tile(0, 0), Tile(1, 2), Tile(2, 1)]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_sample_is_read_and_its_target_computed_once(dense, tmp_path, by_target, workers):
    """In whatever order its tiles are wanted; by processes of the loader, too."""
    pair, read = Counting(), []
    get = dense.samples.__class__.__getitem__
    samples = dense.samples
    file = RatioFile(tmp_path, 'ratios', samples, Processes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples.__class__, '__getitem__', lambda self, i: (read.append(i), get(self, i))[1])
        file.compute(pair, MIXED, workers, QUIET)
    assert pair.targets == [1, 3, 4]
    assert read == ([] if workers else [0, 1, 2]), 'a worker is another process'
    assert all(file[tile] == Losses(TILES[tile.sample], TILES[tile.sample]) for tile in MIXED)


def test_processes_compute_targets_together(dense, tmp_path, by_target):
    """Each when any has to, as they run sharded models together; each tile has its own sample's."""
    pairs = [Counting(), Counting()]
    for rank, pair in enumerate(pairs):
        (tmp_path / str(rank)).mkdir()
        file = RatioFile(tmp_path / str(rank), 'ratios', dense.samples, Two(rank))
        file.compute(pair, MIXED, 0, QUIET)
        mine = list(whole_lines(tmp_path / str(rank) / f'ratios-{rank}.jsonl'))
        assert len(mine) == 3
        assert all(entry['full'] == entry['compressed'] for entry in mine)
    assert [pair.targets for pair in pairs] == [[1, 3], [4, 4]]


def test_a_line_that_was_broken_off_is_computed_again(dense, tmp_path):
    path = tmp_path / 'ratios-0.jsonl'
    whole = json.dumps({'line': [0, 1], 'tile': 0, 'full': 1.0, 'compressed': 2.0}) + '\n'
    path.write_text(whole + whole[:20])
    file = RatioFile(tmp_path, 'ratios', dense.samples, Processes())
    assert file.missing([Tile(1, 0), Tile(2, 1)]) == [Tile(2, 1)]
    assert path.read_text() == whole + whole[:20], 'others may be reading it'


def test_epsilon_defines_what_has_no_ratio():
    assert ratio(Losses(2.0, 3.0), 0.0) == 1.5
    assert ratio(Losses(0.0, 0.5), 0.01) == pytest.approx(51)
    assert ratio(Losses(0.0, 0.5), 0.0) == float('inf')
    assert ratio(Losses(0.0, 0.0), 0.0) == 1.0


def test_a_plan_has_one_tile_a_sample_and_none_of_texts():
    tiles = [1, 3, 4, 0]
    plan = Plan(tiles, seed=0)
    seen = [plan[place] for place in range(300)]
    assert {tile.sample for tile in seen} == {0, 1, 2}
    assert {tile.tile for tile in seen if tile.sample == 2} == {0, 1, 2, 3}
    assert sorted(tile.sample for tile in plan.one_pass()) == [0, 1, 2]
    assert seen == [Plan(tiles, seed=0)[place] for place in range(300)]
    with pytest.raises(TrainingError, match='No sample has an image'):
        Plan([0, 0], seed=0)
