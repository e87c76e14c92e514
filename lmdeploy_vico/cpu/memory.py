"""How much host memory the KV cache may take, and how a tensor-parallel group shares the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
CGROUP = '/sys/fs/cgroup'
# LMDeploy takes `cache_max_entry_count` (0.8) of what the device reports as free. A host shares its memory with
# everything else and a first touch of every page takes time, so what is reported is a small part of it.
CACHE_FRACTION = 0.25
CACHE_LIMIT = 4 * GIB
# Parameters below which a model is computed on one thread.
SMALL_MODEL = 16 << 20

_ranks = 1


def total_memory() -> int:
    """Host memory in bytes, or the control group's limit where that is lower."""
    return min([psutil.virtual_memory().total, *_cgroup_values('memory.max', 'memory/memory.limit_in_bytes')])


def available_memory() -> int:
    """Memory in bytes that a new allocation can get, of the host or of the control group.

    A control group's use includes the files that the kernel keeps for want of anything better. It gives them up when
    memory is asked for, and they fill the group sooner or later: what has not been read again counts as available.
    """
    used = _cgroup_values('memory.current', 'memory/memory.usage_in_bytes')
    left = [max(0, total_memory() - max(0, value - _cgroup_files())) for value in used]
    return min([psutil.virtual_memory().available, *left])


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


def _cgroup_values(*names: str) -> list[int]:
    """The first readable integer among control-group files (version 2, then 1), as a list of at most one."""
    for name in names:
        try:
            text = _read(name).strip()
        except OSError:
            continue
        return [int(text)] if text.isdigit() else []
    return []


def _cgroup_files() -> int:
    """Bytes of files that a control group keeps and nobody has read twice, its children's included."""
    for name, key in (('memory.stat', 'inactive_file'), ('memory/memory.stat', 'total_inactive_file')):
        try:
            values = dict(line.split() for line in _read(name).splitlines())
        except (OSError, ValueError):
            continue
        return int(values.get(key, 0))
    return 0


def _read(name: str) -> str:
    with open(os.path.join(CGROUP, name)) as file:
        return file.read()
