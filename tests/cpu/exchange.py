"""What each of several processes does in the tests of collectives over ranks with different numbers of tokens."""

import torch
import torch.distributed as dist

from lmdeploy_vico.cpu import gathering

SIZES = (1, 7, 2, 3)  # tokens of four ranks
PAIRED = (3, 5)  # tokens of two data-parallel ranks, each of which is two ranks
WIDTH = 6


def tokens(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(rank: int, store: str) -> None:
    """Raise AssertionError if a rank gets anything but what a computation in one process says."""
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=len(SIZES))
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            check(rank, dtype)
    finally:
        dist.destroy_process_group()


def check(rank: int, dtype: torch.dtype) -> None:
    own = [tokens(seed, size, dtype) for seed, size in enumerate(SIZES)]
    assert torch.equal(gathering.gather(own[rank], SIZES, None), torch.cat(own))
    partial = torch.stack([tokens(10 + seed, sum(SIZES), dtype) for seed in range(len(SIZES))])
    out = torch.empty_like(own[rank])
    gathering.reduce_scatter(out, partial[rank].split(SIZES), None)
    close(out, partial.float().sum(0).split(SIZES)[rank])
    partial = torch.stack([tokens(20 + seed, sum(PAIRED), dtype) for seed in range(len(SIZES))])
    out = gathering.reduce_scatter_by_sizes(partial[rank], rank, PAIRED, None)
    close(out, partial.float().sum(0).split(PAIRED)[rank // 2])


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    # Three additions, each rounded to the type: 2**-8 of bfloat16's largest partial sum, which is below 8.
    tolerance = 3 * 8 / 256 if out.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
