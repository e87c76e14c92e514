"""Runs of training in this process, as the command line starts them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from waiting import HANG

from lmdeploy_vico import cli
from lmdeploy_vico.training import command
from lmdeploy_vico.training.loop.folder import entries
from lmdeploy_vico.training.loop.processes import Processes

BFLOAT16 = [str(Path(__file__).parent / 'bfloat16.py')]  # the command line, computing as on a GPU


def made(stage, *words, workers=0):
    """The run that a command line stands for."""
    parsed = cli.parser().parse_args(['train', stage, *map(str, words), '--workers', str(workers)])
    pace = command.Pace(parsed.micro_batch, parsed.workers, parsed.save_every, parsed.log_every)
    return command.make(parsed, stage, pace, Processes(), Console(file=io.StringIO()))


def log_of(path, *names):
    return [(entry['phase'], entry['step'], *(entry[name] for name in names)) for entry in entries(path)]


def report_of(path):
    return json.loads((path / 'report.json').read_text())


def weights_of(path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(path.glob('*.safetensors')):
        with safe_open(file, framework='pt') as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return weights


def torchrun(stage, words, program=('-m', 'lmdeploy_vico.cli')):
    """Run a stage in two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [*program, 'train', stage, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    )
    assert done.returncode == 0, done.stderr
