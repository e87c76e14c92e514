"""All samples are looked at before a run begins: what is wrong with one shall not be found in its tenth hour."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training import CommonError
from lmdeploy_vico.training.data.records import DataError, Records
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.processes import Processes

SHOWN = 5  # bad samples that a message names


class Reader:
    """Reads and checks files of samples for one checkpoint.

    Args:
        tokenizer, config: the checkpoint's.
        max_tiles, max_length: of a sample.
        seed: of what a fractional ``repeat_time`` takes.
        processes: of the run.
        console: for progress.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: VicoConfig,
        max_tiles: int,
        max_length: int,
        seed: int,
        processes: Processes,
        console: Console,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._max_tiles, self._max_length, self._seed = max_tiles, max_length, seed
        self._processes, self._console = processes, console

    def read(self, path: Path) -> tuple[Samples, list[int]]:
        """Look at every sample but for the pixels of its images, each process at its share of them.

        Returns:
            The samples, and the number of tiles of each.

        Raises:
            CommonError: some are bad, and the first few are named by file and line; or a file cannot be read at all.
        """
        samples, found, bad = self._look(path)
        # What is wrong with a whole file, every process has found.
        bad = list(dict.fromkeys(self._processes.gather(bad)))
        if bad or samples is None:
            more = f'\n... and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''
            raise CommonError('\n'.join(bad[:SHOWN]) + more)
        tiles = dict(self._processes.gather(found))
        return samples, [tiles[samples.records.line(index)] for index in range(len(samples))]

    def _look(self, path: Path) -> tuple[Samples | None, list[tuple[tuple[int, int], int]], list[str]]:
        """The samples, the line and the number of tiles of this process's share of them, and what is wrong."""
        try:
            records = Records(path, self._seed)
        except DataError as error:
            return None, [], [str(error)]
        samples = Samples(records, self._tokenizer, self._config, self._max_tiles, self._max_length)
        found, bad = [], []
        mine = records.distinct()[self._processes.rank :: self._processes.size]
        for index in track(mine, f'checking {path.name}', console=self._console, disable=not self._processes.first):
            try:
                found.append((records.line(index), samples.tiles_of(index)))
            except DataError as error:
                bad.append(str(error))
        return samples, found, bad
