"""The loop over steps: micro-batches, gradients, optimiser, schedule, log, state.

It is written out, with PyTorch's FSDP2, distributed checkpoints and AdamW, and with the processes of ``accelerate``.
The loops of ``transformers`` and ``accelerate`` shard on GPUs only; here a run on two CPU processes has to give what
one gives.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.loop.folder import Log, RunFolder
from lmdeploy_vico.training.loop.loader import prepared
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.weights import whole

LOWER = 'lower the learning rate, and repeat the command to go on from the last state that was kept.'
LINES = 20  # of progress in the log of a run
VECTORS = ('class_embedding', 'position_embedding', 'query_token')
# Samples of a micro-batch in, the loss of each out, ``[B]``.
Objective = Callable[[Sequence[Any]], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of the optimiser.
        batch: samples of a step, of all processes together.
        rate, least_rate: learning rates at the top and at the end of the cosine.
        rise: steps in which the rate rises to the top before it: step k of them, from 1 on, has k / rise of it.
        weight_decay: AdamW's; see :func:`is_decayed`.
        clip: the norm that gradients are brought down to.
    """

    steps: int
    batch: int
    rate: float
    least_rate: float
    rise: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0

    def share_of_rate(self, done: int) -> float:
        """The learning rate of the step after so many that are done, as a share of the top."""
        if done < self.rise:
            return (done + 1) / self.rise
        least = self.least_rate / self.rate
        progress = (done - self.rise) / max(1, self.steps - self.rise)
        return (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)) + least


@dataclass(frozen=True)
class Pace:
    """What changes neither what is learnt nor how fast, but for rounding.

    Attributes:
        micro_batch: samples that a process takes at a time.
        workers: processes that prepare samples, of each process.
        save_every: steps between two states that are kept.
        log_every: steps between two lines of the log.
    """

    micro_batch: int = 1
    workers: int = 0
    save_every: int = 100
    log_every: int = 1


class Loop:
    """Trains what requires a gradient in a model.

    Args:
        name: of the phase, in log and state.
        model: filled and, if there are several processes, sharded.
        places: makes the sample at each place of the run, step after step.
        objective: of a micro-batch.
        kept: whether a parameter of this name belongs to the state; all that this phase or an earlier one trains.
        schedule, pace: how.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        places: Dataset,
        objective: Objective,
        kept: Callable[[str], bool],
        schedule: Schedule,
        pace: Pace,
        processes: Processes,
    ) -> None:
        self._name, self._model, self._places, self._objective = name, model, places, objective
        self._kept, self._schedule, self._pace, self._processes = kept, schedule, pace, processes
        self._share = local_share(schedule.batch, pace.micro_batch, processes.size)
        model.zero_grad()  # nothing of an earlier phase is left
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._trained = [parameter for _, parameter in trained]
        groups: list[dict[str, Any]] = [
            {'params': [one for name, one in trained if is_decayed(name, one) == decayed], 'weight_decay': decay}
            for decayed, decay in ((True, schedule.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group['params']], lr=schedule.rate)
        self._rates = LambdaLR(self._optimizer, schedule.share_of_rate)

    def run(self, folder: RunFolder, log: Log, console: Console) -> None:
        """Go on from the folder's newest state to the last step, and keep that.

        Raises:
            TrainingError: the loss or its gradient is no number any more.
        """
        begun = folder.newest(self._name) or 0
        if begun:
            self._restore(folder, begun)
        log.forget_after(self._name, begun)
        batches = self._batches(begun)
        with self._progress(console) as progress:
            task = progress.add_task(self._name, total=self._schedule.steps, completed=begun, loss='')
            for step in range(begun + 1, self._schedule.steps + 1):
                values = self._step(batches, step)
                progress.update(task, completed=step, loss=f'loss {values["loss"]:.4g}')
                self._say(step, values, console)
                if step % self._pace.log_every == 0 or step == self._schedule.steps:
                    log.write(self._name, step, values)
                if step % self._pace.save_every == 0 or step == self._schedule.steps:
                    folder.save(self._name, step, self._state())

    def _step(self, batches: Iterator[list[Any]], step: int) -> dict[str, float]:
        began, total = time.perf_counter(), 0.0
        for _ in range(self._share // self._pace.micro_batch):
            items = next(batches)
            with self._processes.autocast():
                losses = self._objective(items)
            loss = losses.sum() / self._share
            loss.backward()
            total += loss.item()
        [total] = self._processes.mean([total])
        if not math.isfinite(total):
            raise TrainingError(f'{self._name}, step {step}: the loss is {total}: {LOWER}')
        norm = whole(nn.utils.clip_grad_norm_(self._trained, self._schedule.clip)).item()
        if not math.isfinite(norm):
            raise TrainingError(f'{self._name}, step {step}: the norm of the gradient is {norm}: {LOWER}')
        rate = float(self._rates.get_last_lr()[0])
        self._optimizer.step()
        self._rates.step()
        self._optimizer.zero_grad()
        return {'loss': total, 'rate': rate, 'gradient_norm': norm, 'seconds': time.perf_counter() - began}

    def _batches(self, begun: int) -> Iterator[list[Any]]:
        """Micro-batches of this process from the step after ``begun`` on."""
        size, share = self._schedule.batch, self._share
        first = self._processes.rank * share
        places = [step * size + first + i for step in range(begun, self._schedule.steps) for i in range(share)]
        return prepared(self._places, places, self._pace.micro_batch, self._pace.workers)

    def _say(self, step: int, values: Mapping[str, float], console: Console) -> None:
        """Print a line now and then where no progress bar can be drawn."""
        every = -(-self._schedule.steps // LINES)
        if self._processes.first and not console.is_terminal and step % every == 0:
            line = f'{self._name}: step {step} of {self._schedule.steps}, loss {values["loss"]:.4g}'
            console.print(line, highlight=False, soft_wrap=True)

    def _state(self) -> dict[str, Any]:
        model = {name: value for name, value in get_model_state_dict(self._model).items() if self._kept(name)}
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)
        return {'model': model, 'optimizer': optimizer, 'rates': self._rates.state_dict()}

    def _restore(self, folder: RunFolder, step: int) -> None:
        state = self._state()
        folder.load(self._name, step, state)
        set_model_state_dict(self._model, state['model'], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self._model, self._optimizer, state['optimizer'])
        self._rates.load_state_dict(state['rates'])

    def _progress(self, console: Console) -> Progress:
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[loss]}'),
        )
        return Progress(*columns, TimeRemainingColumn(), console=console, disable=not self._processes.first)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    As is common in the field (``transformers``' Trainer, nanoGPT), it does to matrices, among them the embedding of
    tokens, and not to norms and biases. The ViT's class and position embeddings and the router's query token are
    vectors that are added or asked with, though they have more dimensions: they are not decayed either.
    """
    return parameter.dim() > 1 and name.rpartition('.')[2] not in VECTORS


def require_possible(schedules: Sequence[Schedule], pace: Pace, processes: int) -> None:
    """Raise TrainingError where a run could not be made of these; before anything is read."""
    for schedule in schedules:
        if schedule.steps < 0 or schedule.batch < 1 or not 0 < schedule.rate < math.inf:
            raise TrainingError('Steps must be 0 or more, --batch 1 or more, and learning rates more than 0.')
        if not 0 <= schedule.least_rate <= schedule.rate or schedule.weight_decay < 0:
            raise TrainingError('--least-rate must be from 0 to --rate, and --weight-decay 0 or more.')
    if not sum(schedule.steps for schedule in schedules):
        raise TrainingError('There are no steps: nothing would be trained.')
    if min(pace.micro_batch, pace.save_every, pace.log_every) < 1 or pace.workers < 0:
        raise TrainingError('--micro-batch, --save-every and --log-every must be 1 or more, --workers 0 or more.')
    for schedule in schedules:
        local_share(schedule.batch, pace.micro_batch, processes)


def local_share(batch: int, micro_batch: int, processes: int) -> int:
    """The samples that each process takes of a step; raises TrainingError where they cannot be divided."""
    if batch % (micro_batch * processes):
        raise TrainingError(
            f'A batch of {batch} samples cannot be divided among {processes} processes in micro-batches of '
            f'{micro_batch}.'
        )
    return batch // processes
