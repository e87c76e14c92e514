"""What a result says of where it comes from."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ('lmdeploy', 'torch', 'triton', 'pillow', 'numpy')


def facts() -> dict[str, Any]:
    """Device, processor cores, versions and commit of this run."""
    cuda = torch.cuda.is_available()
    known = {
        'device': torch.cuda.get_device_name() if cuda else 'CPU',
        'processor': processor(),
        'cores': len(os.sched_getaffinity(0)),
        'python': platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        'torch_threads': torch.get_num_threads(),
        'commit': commit(),
    }
    if cuda:
        known['cuda'] = torch.version.cuda
        known['multiprocessors'] = torch.cuda.get_device_properties(0).multi_processor_count
    return known


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The commit, with a plus sign where the working tree differs from it; None outside a repository."""
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty=+', '--abbrev=10', '--exclude=*'],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
