"""The folder of a run: what was asked for, how far it has come, and its log."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.loop.processes import Processes

SETTINGS, LOG, STATE, TENSORBOARD = 'training.json', 'log.jsonl', 'state', 'tensorboard'
PIECE = 1 << 20  # bytes


class RunFolder:
    """Where a run keeps its state, so that the same command goes on after an interruption.

    Args:
        path: the folder; it is made if need be.
        settings: what decides the run's result. A folder that was begun with others is refused.
        processes: of the run.
        files: whose content decides it too; those that do not exist are left out.

    Raises:
        TrainingError: the folder belongs to a run with other settings, or holds something else.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], processes: Processes, files: Iterable[Path] = ()
    ) -> None:
        self.path, self._processes = path, processes
        if processes.first:
            content = {f'content of {file}': _digest(file) for file in files if file.is_file()}
            self._claim(json.loads(json.dumps({**settings, **content})))
        processes.wait()

    def _claim(self, settings: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / SETTINGS
        if not file.exists():
            if any(other.suffix != '.partial' for other in self.path.iterdir()):
                raise TrainingError(
                    f'{self.path} holds something that is not of a training run: choose another folder.'
                )
            write_json(file, settings)
            return
        before = json.loads(file.read_text(encoding='utf-8'))
        other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if other:
            raise TrainingError(
                f'{self.path} was begun with other settings ({", ".join(sorted(other))}): repeat the same command '
                'to go on with it, or choose another folder.'
            )

    def newest(self, phase: str) -> int | None:
        """The last step of a phase whose state was kept whole."""
        steps = [int(path.name.rpartition('-')[2]) for path in (self.path / STATE).glob(f'{phase}-*[0-9]')]
        return max(steps, default=None)

    def save(self, phase: str, step: int, state: dict[str, Any]) -> None:
        """Keep a state, and then no other; all processes have to call this."""
        folder = self.path / STATE / f'{phase}-{step:08d}'
        partial = folder.with_suffix('.partial')
        dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
        self._processes.wait()
        if self._processes.first:
            partial.rename(folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        self._processes.wait()

    def load(self, phase: str, step: int, state: dict[str, Any]) -> None:
        """Fill ``state`` in place with what was kept; all processes have to call this."""
        folder = self.path / STATE / f'{phase}-{step:08d}'
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())

    def log(self) -> 'Log':
        """The run's log, of the first process; the others' writes nothing."""
        return Log(self.path if self._processes.first else None)


class Log:
    """Numbers by step, as lines of JSON and for TensorBoard."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._writer = path, None
        if path is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path / TENSORBOARD))

    def forget_after(self, phase: str, step: int) -> None:
        """Drop what an interrupted run logged of a phase after the state from which it goes on."""
        if self._path is None or not (self._path / LOG).exists():
            return
        kept = [entry for entry in entries(self._path) if entry['phase'] != phase or entry['step'] <= step]
        (self._path / LOG).write_text(''.join(json.dumps(entry) + '\n' for entry in kept), encoding='utf-8')

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Add a step's numbers."""
        if self._path is None or self._writer is None:
            return
        with (self._path / LOG).open('a', encoding='utf-8') as file:
            file.write(json.dumps({'phase': phase, 'step': step, **values}) + '\n')
        for name, value in values.items():
            self._writer.add_scalar(f'{phase}/{name}', value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log."""
    return whole_lines(path / LOG)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file of JSON lines, without a last line that an interruption has broken off."""
    for line in path.read_text(encoding='utf-8').split('\n')[:-1]:
        yield json.loads(line)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(path.name + '.partial')
    partial.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
    partial.replace(path)
