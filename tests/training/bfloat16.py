"""The command line, with matrices multiplied in bfloat16 as on a GPU; started by tests."""

import sys

import torch

from lmdeploy_vico import cli
from lmdeploy_vico.training.loop.processes import Processes


class AsOnGpu(Processes):
    def __init__(self) -> None:
        super().__init__()
        self.compute = torch.bfloat16


if __name__ == '__main__':
    from lmdeploy_vico.training import command

    command.Processes = AsOnGpu
    sys.exit(cli.main(sys.argv[1:]))
