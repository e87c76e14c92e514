"""Collectives over ranks with different numbers of tokens, which gloo does not have.

With data-parallel attention each rank has its own sequences, while the ranks share the layers behind it. Tensors are
padded to the longest for the exchange, and cut afterwards.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Done:
    """The handle of an exchange that has ended before it is returned."""

    def wait(self) -> None:
        """Nothing is pending."""


def gather(x: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return every rank's ``x [..., its size, n]`` behind each other: ``[..., sum of sizes, n]``."""
    longest = max(sizes)
    padded = _pad(x, longest)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(-2, 0, size) for part, size in zip(parts, sizes, strict=True)], -2)


def reduce_scatter(out: torch.Tensor, parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Write the sum over the ranks of this rank's part to ``out [..., its size, n]``.

    Args:
        out: one of the parts, or another tensor of the same shape as this rank's part.
        parts: one for each rank of the group, ``[..., the rank's size, n]``.
        group: the ranks.
    """
    longest = max(part.shape[-2] for part in parts)
    summed = torch.stack([_pad(part, longest) for part in parts])
    dist.all_reduce(summed, group=group)
    out.copy_(summed[dist.get_rank(group)].narrow(-2, 0, out.shape[-2]))


def reduce_scatter_by_sizes(
    x: torch.Tensor, rank: int, sizes: Sequence[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the sum over the ranks of this rank's part of ``x [..., sum of sizes, n]``.

    Args:
        x: the same tokens on every rank, to be summed.
        rank: in the group.
        sizes: tokens of each data-parallel rank, which may be several ranks of the group.
        group: the ranks.
    """
    ranks = dist.get_world_size(group) // len(sizes)
    parts = [part for part in x.split(list(sizes), -2) for _ in range(ranks)]
    out = torch.empty_like(parts[rank])
    reduce_scatter(out, parts, group)
    return out


def _pad(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, size - x.shape[-2])).contiguous()
