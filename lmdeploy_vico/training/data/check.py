"""All samples are looked at before a run begins: what is wrong with one shall not be found in its tenth hour."""

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.data.records import DataError
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.processes import Processes

SHOWN = 5  # bad samples that a message names


def check(samples: Samples, processes: Processes) -> list[int]:
    """Read every sample but for the pixels of its images, each process its share of them.

    Returns:
        The number of tiles of each sample.

    Raises:
        TrainingError: some are bad; the first few are named by file and line.
    """
    found, bad = [], []
    for index in samples.records.distinct()[processes.rank :: processes.size]:
        try:
            found.append((samples.records.line(index), samples.tiles_of(index)))
        except DataError as error:
            bad.append(str(error))
    bad = processes.gather(bad)
    if bad:
        more = f'\n... and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''
        raise TrainingError('\n'.join(bad[:SHOWN]) + more)
    tiles = dict(processes.gather(found))
    return [tiles[samples.records.line(index)] for index in range(len(samples))]
