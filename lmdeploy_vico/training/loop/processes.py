"""The processes of a run, as torchrun starts them, and what they do together."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lmdeploy_vico.training.data.batches import Batch
from lmdeploy_vico.training.model.build import shard

PATIENCE = timedelta(hours=12)  # while one process writes a large checkpoint, or checks data, the others wait


class Processes:
    """This process and the others of its run; one alone without torchrun.

    Attributes:
        rank: of this process.
        size: how many there are.
        device: this process's: its GPU, or the CPU where there is none.
        compute: the type in which matrices are multiplied: bfloat16 on a GPU, float32 on a CPU.
    """

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device: torch.device = self._state.device
        self.compute = torch.bfloat16 if self.device.type == 'cuda' else torch.float32

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, model: nn.Module) -> None:
        """Shard a model over the processes, if there are several."""
        if self.size > 1:
            shard(model, self.compute)

    def settle(self, model: nn.Module, batch: Batch) -> None:
        """Run a model once, before training, with everything trained that ever will be.

        FSDP decides in the first pass in which types gradients are reduced, by what is trained at that time.
        """
        if self.size > 1:
            with torch.no_grad():
                model(batch.to(self.device))
            self.release(model)

    def release(self, model: nn.Module) -> None:
        """Shard again what stays gathered after a pass without a gradient.

        The parameters of a model are its shards only then: an optimiser of gathered ones would train copies.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def autocast(self) -> torch.autocast:
        """Multiply in :attr:`compute`, where parameters are not sharded; FSDP casts them itself."""
        enabled = self.size == 1 and self.compute != torch.float32
        return torch.autocast(self.device.type, self.compute, enabled=enabled)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The means over the processes, each of which has to call this."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return (tensor / self.size).tolist()

    def gather(self, values: list) -> list:
        """The lists of all processes, one after another."""
        gathered: list = gather_object(values) if self.size > 1 else values
        return gathered

    def wait(self) -> None:
        """Wait for the others."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()
