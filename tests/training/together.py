"""Several command lines of training in one start of its processes, each computed in a type; started by tests.

Each does what it does by itself, but that the processes go on to the next one.
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
    """Run the command lines of a file: ``[[type, [word, ...]], ...]``."""
    processes, leave = Lasting(), command.leave
    command.Processes, command.leave = lambda: processes, lambda: None
    for compute, words in json.loads(file.read_text()):
        processes.compute = getattr(torch, compute)
        if status := cli.main(words):
            sys.exit(status)
    Processes.close(processes)
    leave()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
