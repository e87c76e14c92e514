"""Several command lines of training in one start of its processes, each computed in a type; started by tests.

The start is most of their time. Each does what it does by itself, but that the processes go on to the next one.
"""

import json
import sys
from pathlib import Path

import torch

from lmdeploy_vico import cli
from lmdeploy_vico.training import command
from lmdeploy_vico.training.loop.processes import Processes


class Lasting(Processes):
    """Processes that stay together after a run."""

    def close(self) -> None:
        pass


def main(file: Path) -> None:
    """Run the command lines of a file, ``[[type, [word, ...]], ...]``; the last one ends the processes as it would."""
    processes, leave = Lasting(), command.leave
    command.Processes, command.leave = lambda: processes, lambda: None
    *others, last = json.loads(file.read_text())
    for compute, words in others:
        run(processes, compute, words)
    processes.__class__, command.leave = Processes, leave
    run(processes, *last)


def run(processes: Processes, compute: str, words: list[str]) -> None:
    processes.compute = getattr(torch, compute)
    if status := cli.main(words):
        sys.exit(status)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
