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
from lmdeploy_vico.training.loop.folder import entries, whole_lines
from lmdeploy_vico.training.loop.processes import Processes

TOGETHER = Path(__file__).parent / 'together.py'


RATES = ['--rate', '3e-4', '--least-rate', '1e-4', '--warm-up-rate', '3e-3']
SHORT = ['--steps', 4, '--batch', 2, '--warm-up-steps', 3, *RATES]
SHORT_ROUTER = ['--steps', 4, '--batch', 2, '--rate', '1e-3']


def options(model, plain, data, output, *more):
    return ['--model', model, '--reference', plain, '--data', data, '--output', output, *more]


def made(stage, *words, workers=0, compute=None):
    """The run that a command line stands for; with ``compute``, multiplying in that type, as on a GPU."""
    parsed = cli.parser().parse_args(['train', stage, *map(str, words), '--workers', str(workers)])
    pace = command.Pace(parsed.micro_batch, parsed.workers, parsed.save_every, parsed.log_every)
    processes = Processes()
    processes.compute = compute or processes.compute
    return command.make(parsed, stage, pace, processes, Console(file=io.StringIO()))


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


def losses_of(file):
    """What was computed of each tile, by line and tile."""
    return {(*entry['line'], entry['tile']): (entry['full'], entry['compressed']) for entry in whole_lines(file)}


def torchrun(*program):
    """Run a program in two processes."""
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([*start, *map(str, program)], capture_output=True, text=True, timeout=HANG, env=environment)
    assert done.returncode == 0, done.stderr
