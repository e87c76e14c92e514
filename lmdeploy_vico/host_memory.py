"""The memory that this process can use: a container's control group may allow less than the host has."""

import os

import psutil

GIB = 2**30  # bytes
CGROUP = '/sys/fs/cgroup'


def total_memory() -> int:
    """Return the host's memory in bytes, or the control group's limit where that is lower."""
    return min([psutil.virtual_memory().total, *_cgroup_values('memory.max', 'memory/memory.limit_in_bytes')])


def share_of_memory(most: int, divisor: int) -> int:
    """Return ``most`` bytes, but no more than the total memory divided by ``divisor``."""
    return min(most, total_memory() // divisor)


def available_memory() -> int:
    """Return the bytes that a new allocation can get, within the host's and the control group's memory.

    A control group's use includes the file cache, which fills the group sooner or later and which the kernel frees when
    memory is needed. So files that were not read a second time count as available.
    """
    used = _cgroup_values('memory.current', 'memory/memory.usage_in_bytes')
    left = [max(0, total_memory() - max(0, value - _cgroup_files())) for value in used]
    return min([psutil.virtual_memory().available, *left])


def _cgroup_values(*names: str) -> list[int]:
    """Return the integer in the first readable of these control-group files, in a list; empty if there is none.

    Args:
        names: the file of version 2 of control groups, then that of version 1.
    """
    for name in names:
        try:
            text = _read(name).strip()
        except OSError:
            continue
        return [int(text)] if text.isdigit() else []
    return []


def _cgroup_files() -> int:
    """Return the bytes of cached files that were read once, of the control group and its children."""
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
