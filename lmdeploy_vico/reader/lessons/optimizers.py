"""What all lessons have in common: optimisers, their schedule, and gradients of several processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

LEAST = 0.03  # of a learning rate is left at the end
CLIP = 1.0  # the norm that gradients are brought down to


@dataclass(frozen=True)
class Rates:
    """Learning rates.

    Attributes:
        matrices: of the layers' matrices, with Muon.
        others: of everything else, with AdamW.
        special: of single tensors, by how their names end.
        betas: AdamW's.
    """

    matrices: float
    others: float
    special: Mapping[str, float]
    betas: tuple[float, float]


@dataclass(frozen=True)
class Schedule:
    """Learning rates rise, stay, and fall in a line to :data:`LEAST`.

    Attributes:
        steps: in all.
        rise: of these, at first.
        falls: the share of the steps after which they fall.
    """

    steps: int
    rise: int
    falls: float

    def at(self, step: int) -> float:
        """The factor of all rates in a step, from 0."""
        fallen = (step / self.steps - self.falls) / (1 - self.falls)
        return min(1.0, (step + 1) / self.rise) * min(1.0, max(LEAST, 1 - fallen))


class Optimizers:
    """Muon for the matrices of layers, AdamW for the rest.

    Args:
        parameters: by name.
        is_layer: whether a parameter is Muon's.
        rates, schedule: how fast.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        is_layer: Callable[[nn.Parameter], bool],
        rates: Rates,
        schedule: Schedule,
    ) -> None:
        named = list(parameters)
        self._parameters = [parameter for _, parameter in named]
        self._schedule = schedule
        matrices = [parameter for _, parameter in named if is_layer(parameter)]
        others: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            if not is_layer(parameter):
                rate = next((rate for end, rate in rates.special.items() if name.endswith(end)), rates.others)
                others.setdefault(rate, []).append(parameter)
        groups = [{'params': group, 'lr': rate} for rate, group in others.items()]
        self._optimizers: Sequence[torch.optim.Optimizer] = (
            torch.optim.Muon(matrices, lr=rates.matrices, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(groups, betas=rates.betas, weight_decay=0.0),
        )
        self._full = [[group['lr'] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def step(self, step: int, loss: Tensor) -> None:
        """Learn from a loss in the step of this number, from 0."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        average_gradients(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, CLIP)
        factor = self._schedule.at(step)
        for optimizer, full in zip(self._optimizers, self._full, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group['lr'] = rate * factor
            optimizer.step()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of all processes, in one message; those that a process has not are zero."""
    if not dist.is_initialized():
        return
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for parameter, part in zip(parameters, together.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
