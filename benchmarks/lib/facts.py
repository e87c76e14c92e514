"""What a result says of where it comes from."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lmdeploy_vico.bench.servers import environment

PACKAGES = ('lmdeploy', 'torch', 'triton', 'pillow', 'numpy')


def facts() -> dict[str, Any]:
    """Device, processor cores, versions and commit of this run."""
    cuda = torch.cuda.is_available()
    about = environment(None)
    known = {
        'device': torch.cuda.get_device_name() if cuda else 'CPU',
        'processor': processor(),
        'cores': len(os.sched_getaffinity(0)),
        'python': about['python'],
        **{name: about[name] if name in about else version(name) for name in PACKAGES},
        'torch_threads': torch.get_num_threads(),
        'commit': about['commit'],
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
