"""Loss ratios (paper, Eq. 2): what it costs to compress a single tile. Each is computed once and kept.

They do not change while the router alone is trained.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.compression import one_tile
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.samples import Sample, Samples
from lmdeploy_vico.training.loop.folder import whole_lines
from lmdeploy_vico.training.loop.loader import prepared
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.losses import Target, sample_means
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.stages.plan import Tile


@dataclass(frozen=True)
class Losses:
    """Eq. 1 of the trained policy against the frozen reference, for one tile of a sample.

    Attributes:
        full: with no tile compressed.
        compressed: with this tile, and no other, compressed.
    """

    full: float
    compressed: float


def ratio(losses: Losses, epsilon: float) -> float:
    """Eq. 2, with epsilon added to both losses, so that it is defined where the policy has not drifted at all."""
    if losses.full + epsilon == 0:
        return float('inf') if losses.compressed else 1.0
    return (losses.compressed + epsilon) / (losses.full + epsilon)


class RatioFile:
    """Losses by file, line and tile, in a file of each process; those of all are read.

    Args:
        path: the run's folder.
        name: of the files.
        samples: whose losses they are.
        processes: of the run.
    """

    def __init__(self, path: Path, name: str, samples: Samples, processes: Processes) -> None:
        self._path, self._name = path, name
        self._samples, self._processes = samples, processes
        self._losses: dict[tuple[tuple[int, int], int], Losses] = {}
        self._read()
        processes.wait()  # nobody adds to the files while others still read them: all find the same missing

    def __getitem__(self, tile: Tile) -> Losses:
        """The losses of a tile, which have been computed."""
        return self._losses[self._key(tile)]

    def missing(self, tiles: Sequence[Tile]) -> list[Tile]:
        """Those that have not been computed, each once."""
        wanted = {self._key(tile): tile for tile in tiles}
        return [tile for key, tile in wanted.items() if key not in self._losses]

    def compute(self, pair: Pair, tiles: Sequence[Tile], workers: int, console: Console) -> None:
        """Compute what is missing, every process its share, and keep it; all processes have to call this.

        Args:
            pair: the models.
            tiles: that are wanted.
            workers: processes that prepare samples, of each process.
            console: for progress.
        """
        # Tiles of a sample are neighbours: it is read, and its target computed, for all of them at once.
        left = sorted(self.missing(tiles), key=self._key)
        file = self._path / f'{self._name}-{self._processes.rank}.jsonl'
        _remove_broken_line(file)
        with file.open('a', encoding='utf-8') as output, Progress(console=console) as progress:
            task = progress.add_task('loss ratios', total=self._share(left), visible=self._processes.first)
            for tile, sample, other in self._work(left, workers):
                if other:
                    target = pair.target(lay_out([sample], [one_tile(len(sample.tiles), None)]))
                losses = tile_losses(pair, sample, tile.tile, target, self._processes)
                entry = {'line': self._samples.records.line(tile.sample), 'tile': tile.tile, **asdict(losses)}
                output.write(json.dumps(entry) + '\n')
                output.flush()
                progress.advance(task)
        self._processes.wait()
        self._read()

    def _share(self, left: Sequence[Tile]) -> int:
        """The tiles that each process takes."""
        return -(-len(left) // self._processes.size)

    def _work(self, left: Sequence[Tile], workers: int) -> Iterator[tuple[Tile, Sample, bool]]:
        """The tiles of this process, each with its sample, and whether a target is to be computed for it.

        Sharded models are run by all processes together. So each has as many tiles, some of which are computed twice,
        and computes a target when any of them needs one.
        """
        share = self._share(left)
        all_tiles = [
            [left[(rank * share + i) % len(left)] for i in range(share)] for rank in range(self._processes.size)
        ]
        begins = [self._begins(each) for each in all_tiles]
        mine, own = all_tiles[self._processes.rank], begins[self._processes.rank]
        numbers = [tile.sample for tile, new in zip(mine, own, strict=True) if new]
        samples = prepared(self._samples, numbers, 1, workers)
        for tile, new, other in zip(mine, own, map(any, zip(*begins, strict=True)), strict=True):
            if new:
                [sample] = next(samples)
            yield tile, sample, other

    def _begins(self, tiles: Sequence[Tile]) -> list[bool]:
        """Whether each tile is of another sample than the one before it."""
        lines = [self._samples.records.line(tile.sample) for tile in tiles]
        return [line != before for line, before in zip(lines, [None, *lines], strict=False)]

    def _key(self, tile: Tile) -> tuple[tuple[int, int], int]:
        return self._samples.records.line(tile.sample), tile.tile

    def _read(self) -> None:
        for path in sorted(self._path.glob(f'{self._name}-*.jsonl')):
            for entry in whole_lines(path):
                file, line = entry['line']
                self._losses[(file, line), entry['tile']] = Losses(entry['full'], entry['compressed'])


def _remove_broken_line(path: Path) -> None:
    """Cut off a last line that an interruption has broken off."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b'\n') + 1)


@torch.no_grad()
def tile_losses(pair: Pair, sample: Sample, tile: int, target: Target, processes: Processes) -> Losses:
    """The two losses of Eq. 2: the sample with no tile compressed, and with one.

    Args:
        pair: the models.
        sample: that has the tile.
        tile: its number.
        target: what the reference says of the sample.
        processes: of the run.
    """
    count = len(sample.tiles)
    batch = lay_out([sample, sample], [one_tile(count, None), one_tile(count, tile)]).to(processes.device)
    with processes.autocast():
        divergence = pair.policy(batch, Target(target.hidden.repeat(2, 1), target.head))
    full, compressed = sample_means(divergence, batch.responses).tolist()
    if not (math.isfinite(full) and math.isfinite(compressed)):
        raise TrainingError(f'{sample.place}: the loss of a tile is no number: is the checkpoint whole?')
    # Rounding may take a divergence of zero below it.
    return Losses(*np.maximum([full, compressed], 0).tolist())
