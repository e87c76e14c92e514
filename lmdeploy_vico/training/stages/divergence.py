"""How far a model is from its reference when shares of its tiles are compressed: Eq. 1 on held-out samples."""

from collections.abc import Sequence

import numpy as np
import torch

from lmdeploy_vico.training.compression import draw_tiles
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.losses import sample_means
from lmdeploy_vico.training.model.pair import Pair

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def divergence(
    pair: Pair, samples: Samples, shares: Sequence[float], seed: int, processes: Processes
) -> dict[str, float]:
    """The mean of Eq. 1 over samples, with so many of each sample's tiles, chosen at random, compressed.

    Every process takes its share of the samples; of a number that cannot be divided, some take one twice.

    Returns:
        By share, as text.
    """
    count = -(-len(samples) // processes.size)
    mine = [(processes.rank * count + i) % len(samples) for i in range(count)]
    totals = [0.0] * len(shares)
    for index in mine:
        sample = samples[index]
        none = np.zeros(len(sample.tiles), bool)
        target = pair.target(lay_out([sample], [none]))
        for i, share in enumerate(shares):
            batch = lay_out([sample], [draw_tiles(seed, index, len(none), share)]).to(processes.device)
            with processes.autocast():
                totals[i] += sample_means(pair.policy(batch, target), batch.responses).item() / count
    processes.release(pair.policy)
    means = processes.mean(totals)
    return {f'{share:g}': value for share, value in zip(shares, means, strict=True)}
