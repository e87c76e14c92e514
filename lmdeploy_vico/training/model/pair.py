"""Policy and frozen reference: what Eq. 1 compares."""

import torch

from lmdeploy_vico.training.data.batches import Batch
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.adapters import without_adapters
from lmdeploy_vico.training.model.losses import Target
from lmdeploy_vico.training.model.vico_model import VicoModel


class Pair:
    """Two models, or one with adapters, which are off for the reference.

    Attributes:
        policy: what is trained.

    Args:
        policy: see above.
        reference: None where the policy without its adapters is the reference.
        processes: of the run.
    """

    def __init__(self, policy: VicoModel, reference: VicoModel | None, processes: Processes) -> None:
        self.policy = policy
        self._reference, self._processes = reference, processes

    @torch.no_grad()
    def target(self, batch: Batch) -> Target:
        """What the reference says; all tiles of the batch are full."""
        batch = batch.to(self._processes.device)
        if self._reference is None:
            with without_adapters(self.policy):
                return self._target(self.policy, batch)
        return self._target(self._reference, batch)

    def _target(self, model: VicoModel, batch: Batch) -> Target:
        with self._processes.autocast():
            hidden = model(batch)
        # The root's parameters stay gathered after a forward pass.
        return Target(hidden, model.language_model.lm_head.weight.detach())
