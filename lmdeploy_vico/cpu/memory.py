"""How much host memory the KV cache may take, and how a tensor-parallel group shares the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmdeploy_vico.host_memory import GIB, available_memory

if TYPE_CHECKING:
    import torch

# LMDeploy takes `cache_max_entry_count` (0.8) of what the device reports as free. A host shares its memory with
# everything else and a first touch of every page takes time, so what is reported is a small part of it.
CACHE_FRACTION = 0.25
CACHE_LIMIT = 4 * GIB
# Parameters below which a model is computed on one thread.
SMALL_MODEL = 16 << 20

_ranks = 1


def cache_budget() -> int:
    """Bytes reported to LMDeploy as the device's free memory: a quarter of what is available, at most 4 GiB.

    The ranks of a tensor-parallel group share it.
    """
    return int(min(available_memory() * CACHE_FRACTION, CACHE_LIMIT)) // _ranks


def share_host(ranks: int) -> None:
    """Make this process one of ``ranks`` that share the host's processors and memory."""
    import torch

    global _ranks
    if _ranks == 1 and ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        _ranks = ranks


def choose_threads(model: torch.nn.Module) -> None:
    """Compute a small model's steps on one thread; called on the thread that runs the engine.

    Waking a team of threads for products of a few kilobytes costs more than it saves, and on a busy host a team that
    waits for a descheduled thread makes a step a hundred times slower.
    """
    import torch

    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
