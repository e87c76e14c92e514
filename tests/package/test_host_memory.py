"""The host's memory, and a control group's where it allows less."""

from types import SimpleNamespace

import pytest

from lmdeploy_vico import host_memory

GIB = 1 << 30
FILES = {  # by the version of control groups: limit, use, and what counts files in memory.stat
    1: ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat', 'total_inactive_file'),
    2: ('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
}
UNLIMITED = {1: 2**63 - 4096, 2: 'max'}


@pytest.fixture(params=FILES)
def version(request):
    return request.param


@pytest.fixture
def group(monkeypatch, tmp_path, version):
    """``group(limit=..., used=..., stat=...)``: on a host of 100 GiB, of which 60 are available, a control group."""
    monkeypatch.setattr(
        *(host_memory.psutil, 'virtual_memory'), lambda: SimpleNamespace(total=100 * GIB, available=60 * GIB)
    )
    monkeypatch.setattr(host_memory, 'CGROUP', str(tmp_path))

    def write(**values):
        names = dict(zip(('limit', 'used', 'stat'), FILES[version], strict=False))
        for name, value in values.items():
            path = tmp_path / names[name]
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'{value}\n')

    return write


def test_a_control_groups_limit_counts_where_it_is_lower(group, version):
    assert (host_memory.total_memory(), host_memory.available_memory()) == (100 * GIB, 60 * GIB)
    group(limit=UNLIMITED[version], used=3 * GIB)
    assert (host_memory.total_memory(), host_memory.available_memory()) == (100 * GIB, 60 * GIB)
    group(limit=200 * GIB)
    assert (host_memory.total_memory(), host_memory.available_memory()) == (100 * GIB, 60 * GIB)
    group(limit=8 * GIB)
    assert (host_memory.total_memory(), host_memory.available_memory()) == (8 * GIB, 5 * GIB)


def test_files_that_a_control_group_keeps_are_no_lack_of_memory(group, version):
    """They fill it on every host that has read much; an engine that counted them would find no room for its cache."""
    group(limit=8 * GIB, used=8 * GIB)
    assert host_memory.available_memory() == 0
    group(stat=f'inactive_file 5\n{FILES[version][-1]} {4 * GIB}')
    assert host_memory.available_memory() == 4 * GIB
