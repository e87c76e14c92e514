"""How much memory the host has for this process: a container's control group may allow less than there is."""

import os

import psutil

GIB = 2**30
CGROUP = '/sys/fs/cgroup'


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
