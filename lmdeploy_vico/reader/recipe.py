"""The whole way from nothing to the reader: lessons, then what any ViCO model is made with.

Every step is a command that is printed, and one that is over is not repeated: an interrupted run goes on.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lmdeploy_vico.checkpoints.names import GATING, POOLING
from lmdeploy_vico.checkpoints.random.tiny import write_json
from lmdeploy_vico.reader import ReaderError
from lmdeploy_vico.reader.documents.samples import write_samples
from lmdeploy_vico.reader.lessons.run import PLAIN, VANILLA
from lmdeploy_vico.training.model.weights import Tensors
from lmdeploy_vico.training.model.writer import publish
from lmdeploy_vico.training.stages.initialise import read_config

ROUTER = (POOLING, GATING)
VICO, READER, ROUTED = 'vico', 'reader', 'vanilla-routed'
RUN_FILE = 'run.json'  # what a folder is of
PROCESSES = 2
KINDS = {'fine': 0.35, 'medium': 0.25, 'shape': 0.2, 'photo': 0.2}
PAGE_KINDS = {'fine': 0.25, 'medium': 0.25, 'shape': 0.25, 'photo': 0.25}
# One thread a process: two on busy cores cost ten times as much. The result shall not depend on whether there is a GPU.
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'CUDA_VISIBLE_DEVICES': ''}


@dataclass(frozen=True)
class Documents:
    """Documents of a file: their number, the kinds of their tiles, and how many tiles they have, in turn."""

    count: int
    kinds: Mapping[str, float]
    tiles: Sequence[int]


@dataclass(frozen=True)
class Settings:
    """What the stages are given.

    Attributes:
        documents: by name of the file.
        consistency, router: options of ``lmdeploy-vico train``.
    """

    documents: Mapping[str, Documents] = field(
        default_factory=lambda: {
            'train': Documents(6000, KINDS, (1, 3, 1, 2, 1, 5, 1, 4)),
            'pages': Documents(400, PAGE_KINDS, (3, 2, 5, 4)),
            'held-out': Documents(60, PAGE_KINDS, (3, 2, 5, 4)),
        }
    )
    consistency: Mapping[str, Any] = field(
        default_factory=lambda: {
            'train': 'mlp1 mlp2 language', 'warm-up-steps': 0, 'steps': 500, 'batch': 16, 'micro-batch': 8,
            'rate': 5e-4, 'least-rate': 2e-5, 'weight-decay': 0.0,
        }
    )  # fmt: skip
    router: Mapping[str, Any] = field(
        default_factory=lambda: {
            'steps': 400, 'batch': 16, 'micro-batch': 8, 'rate': 1e-3, 'least-rate': 1e-5, 'weight-decay': 0.01,
        }
    )  # fmt: skip


class Recipe:
    """Makes the reader in a folder.

    Args:
        path: the folder.
        settings: of the stages.
        seed: of everything.
        console: for what is done.
    """

    def __init__(self, path: Path, settings: Settings, seed: int, console: Console) -> None:
        self._path, self._settings, self._seed, self._console = path, settings, seed, console

    def make(self) -> Path:
        """Do what has not been done; return the folder of the checkpoint.

        Raises:
            ReaderError: a command failed, or the folder is of another seed.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        self._remember_seed()
        if not (self._path / VANILLA / 'config.json').exists():
            self._torchrun('lmdeploy_vico.reader.lessons.run', self._path, '--seed', self._seed)
        for number, (name, documents) in enumerate(self._settings.documents.items(), 1):
            file = self._path / f'{name}.jsonl'
            if not file.exists():
                self._say(f'Rendering {documents.count} documents: {file}')
                seed = 100_000 * number + self._seed
                write_samples(file, seed, documents.count, documents.kinds, documents.tiles)
        self._train('consistency', VANILLA, 'train', VICO, self._settings.consistency)
        self._train('router', VICO, 'pages', READER, self._settings.router)
        give_router(self._path / READER, self._path / VANILLA, self._path / ROUTED)
        return self._path / READER

    def _remember_seed(self) -> None:
        file = self._path / RUN_FILE
        if not file.exists():
            write_json(file, {'seed': self._seed})
        elif (seed := seed_of(self._path)) != self._seed:
            raise ReaderError(f'{self._path} is a run with --seed {seed}: go on with that, or take another folder.')

    def _train(self, stage: str, model: str, data: str, output: str, options: Mapping[str, Any]) -> None:
        given = {'model': model, 'reference': PLAIN, 'output': output}
        files = {'data': f'{data}.jsonl', 'held-out': 'held-out.jsonl'}
        paths = {name: self._path / value for name, value in {**given, **files}.items()}
        words = [word for name, value in {**paths, **options}.items() for word in (f'--{name}', *str(value).split())]
        self._torchrun('lmdeploy_vico.cli', 'train', stage, *words, '--workers', 0, '--seed', self._seed)

    def _torchrun(self, module: str, *arguments: object) -> None:
        words = ['torchrun', '--standalone', '--nproc-per-node', PROCESSES, '-m', module, *arguments]
        [name, *rest] = [str(word) for word in words]
        self._say('$ ' + shlex.join([name, *rest]))
        began = time.monotonic()
        command = [sys.executable, '-m', 'torch.distributed.run', *rest]
        code = subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode
        if code:
            raise ReaderError(f'{module} ended with status {code}; repeat the command to go on from its last state.')
        self._say(f'{(time.monotonic() - began) / 60:.1f} minutes')

    def _say(self, text: str) -> None:
        self._console.print(text, style='bold', highlight=False, soft_wrap=True)


def seed_of(path: Path) -> int:
    """The seed of the run in a folder.

    Raises:
        ReaderError: there is no run, or its file is damaged.
    """
    try:
        return int(json.loads((path / RUN_FILE).read_text(encoding='utf-8'))['seed'])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReaderError(f'{path / RUN_FILE} does not say with which seed the run was begun: {error}') from error


def give_router(giver: Path, taker: Path, path: Path) -> None:
    """Write the checkpoint ``taker`` with router and thresholds of ``giver`` into ``path``: nothing else may differ."""
    theirs = Tensors(giver)
    names = [name for name in theirs.shapes if name.startswith(ROUTER)]
    config = read_config(giver)
    path.mkdir(parents=True, exist_ok=True)
    publish(path, config, taker, Tensors(taker), names, ((name, theirs.read(name)) for name in names))
