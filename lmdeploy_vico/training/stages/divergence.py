"""How far a model is from its reference when shares of its tiles are compressed: Eq. 1 on held-out samples."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from lmdeploy_vico.training.compression import draw_tiles
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.losses import Target, sample_means
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.model.vico_model import VicoModel

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def targets_of(pair: Pair, samples: Samples, processes: Processes) -> Iterator[Target]:
    """What the reference says of each sample of this process, with no tile compressed."""
    for index in _mine(samples, processes):
        sample = samples[index]
        yield pair.target(lay_out([sample], [np.zeros(len(sample.tiles), bool)]))


@torch.no_grad()
def divergence(
    policy: VicoModel,
    targets: Iterable[Target],
    samples: Samples,
    shares: Sequence[float],
    seed: int,
    processes: Processes,
) -> dict[str, float]:
    """The mean of Eq. 1 over samples, with so many of each sample's tiles, chosen at random, compressed.

    Every process takes its share of the samples; of a number that cannot be divided, some take one twice.

    Args:
        policy: that is judged.
        targets: from :func:`targets_of`, for the same samples and processes.
        samples: to judge by.
        shares: of compressed tiles.
        seed: of the choice of tiles.
        processes: of the run.

    Returns:
        By share, as text.
    """
    mine = _mine(samples, processes)
    totals = [0.0] * len(shares)
    for index, target in zip(mine, targets, strict=True):
        sample = samples[index]
        for i, share in enumerate(shares):
            batch = lay_out([sample], [draw_tiles(seed, index, len(sample.tiles), share)]).to(processes.device)
            with processes.autocast():
                totals[i] += sample_means(policy(batch, target), batch.responses).item() / len(mine)
    processes.release(policy)
    means = processes.mean(totals)
    return {f'{share:g}': value for share, value in zip(shares, means, strict=True)}


def _mine(samples: Samples, processes: Processes) -> list[int]:
    """The numbers of this process's samples: each process has as many, as they run sharded models together."""
    count = -(-len(samples) // processes.size)
    return [(processes.rank * count + i) % len(samples) for i in range(count)]
