"""What a lesson prints as it goes on: running means of what it measures."""

import time

import torch.distributed as dist
from rich.console import Console


class Progress:
    """Running means, printed every so many steps by the first process.

    Args:
        lesson: its name.
        steps: in all.
        every: steps between two lines.
        console: where to.
    """

    def __init__(self, lesson: str, steps: int, every: int, console: Console) -> None:
        self._lesson, self._steps, self._every, self._console = lesson, steps, every, console
        self._means: dict[str, float] = {}
        self._began = time.monotonic()

    def note(self, name: str, value: float) -> None:
        """Add a value to its running mean."""
        self._means[name] = 0.95 * self._means.get(name, value) + 0.05 * value

    def step(self, number: int) -> None:
        """Say that a step, from 0, is over."""
        done = number + 1
        if (done % self._every == 0 or done == self._steps) and not (dist.is_initialized() and dist.get_rank()):
            minutes = (time.monotonic() - self._began) / 60
            means = ' '.join(f'{name} {value:.3f}' for name, value in sorted(self._means.items()))
            self._console.print(
                f'{self._lesson}: step {done} of {self._steps}, {minutes:.1f} min: {means}', soft_wrap=True
            )
