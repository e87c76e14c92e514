"""How much host memory the KV cache may take, and how many threads each process uses."""

import os

import psutil

GIB = 1 << 30
# LMDeploy takes `cache_max_entry_count` (0.8) of what the device reports as free. A host shares its memory with
# everything else and a first touch of every page takes time, so what is reported is a small part of it.
CACHE_FRACTION = 0.25
CACHE_LIMIT = 4 * GIB


def total_memory() -> int:
    """Host memory in bytes, or the control group's limit where that is lower."""
    return min([psutil.virtual_memory().total, *_cgroup_values('memory.max', 'memory/memory.limit_in_bytes')])


def available_memory() -> int:
    """Memory in bytes that a new allocation can get, of the host or of the control group."""
    used = _cgroup_values('memory.current', 'memory/memory.usage_in_bytes')
    left = [max(0, total_memory() - value) for value in used]
    return min([psutil.virtual_memory().available, *left])


def cache_budget() -> int:
    """Bytes reported to LMDeploy as the device's free memory: a quarter of what is available, at most 4 GiB."""
    return int(min(available_memory() * CACHE_FRACTION, CACHE_LIMIT))


def threads_per_rank(world_size: int) -> int:
    """Compute threads for each of ``world_size`` tensor-parallel processes on this host."""
    import torch

    return max(1, torch.get_num_threads() // world_size)


def _cgroup_values(*names: str) -> list[int]:
    """The first readable integer among control-group files (version 2, then 1), as a list of at most one."""
    for name in names:
        try:
            with open(os.path.join('/sys/fs/cgroup', name)) as file:
                text = file.read().strip()
        except OSError:
            continue
        return [int(text)] if text.isdigit() else []
    return []
