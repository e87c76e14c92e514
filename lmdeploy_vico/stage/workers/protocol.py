"""What a stage needs of a worker, and what a worker needs of the encoder of its device.

An encoder elsewhere is driven by the same thread as one here, see :mod:`lmdeploy_vico.stage.remote`. Tiles leave in
device batches, as uint8 pixels, and scores come back; a prompt is routed where its scores are, at home; its visual
tokens come back once, when they have been projected.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.stage.tiles import Elsewhere
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import TileFeatures
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import RoutingGroup


class Features(Protocol):
    """Results of a batch: a :class:`~lmdeploy_vico.vision.batches.TileFeatures`, or scores alone."""

    @property
    def patches(self) -> Sequence[torch.Tensor | Elsewhere]:
        """``[1024, D]`` for each tile, or where they lie."""

    @property
    def scores(self) -> torch.Tensor:
        """The router's p[0] of each tile, float32 ``[n]`` in host memory."""


class DeviceBatch(Protocol):
    """A device batch that has been started."""

    @property
    def seconds(self) -> float:
        """How long the device took, known once :meth:`wait` has returned."""

    def wait(self) -> Features:
        """Return the features and scores of the batch's tiles when they are there; raise what failed."""


class DeviceEncoder(Protocol):
    """The vision side of a checkpoint on one device. One worker uses it, from one thread."""

    @property
    def device(self) -> torch.device | str:
        """Where it encodes, a name if that is elsewhere. Log and error messages name it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of patch tokens."""

    @property
    def config(self) -> VicoConfig:
        """The checkpoint's config, whose widths size the memory for results."""

    @property
    def tile_batch(self) -> int:
        """The most tiles of a device batch."""

    @property
    def copies_results(self) -> bool:
        """Whether results are copied from a device, which is faster into pinned memory."""

    def enter_thread(self) -> None:
        """Get ready, in the thread that is going to use this encoder."""

    def use_memory(self, memory: ResultMemory | None) -> None:
        """Leave results in pinned memory that is lent, while there is room; None for ordinary memory."""

    def usable(self) -> bool:
        """Return whether the device still answers. After some errors it never does again."""

    def start(self, tiles: Sequence[np.ndarray]) -> DeviceBatch:
        """Begin to encode and score at most ``tile_batch`` tiles, uint8 ``[448, 448, 3]``.

        Two batches may be on the way at a time, and are waited for in the order in which they were started.
        """

    def visual_tokens(
        self, features: TileFeatures, counts: Sequence[int], groups: Sequence[RoutingGroup], dtype: torch.dtype
    ) -> list[VisualTokens]:
        """Route and project the tiles of one prompt.

        Args:
            features: of all tiles, image after image.
            counts: tiles of each image.
            groups: which images are routed together, and by which compression.
            dtype: of the embeddings.

        Returns:
            The visual tokens of each image, on the CPU.
        """


class Worker(Protocol):
    """Encodes the tiles of a stage on one device, from :meth:`start` until the stage's queue is closed."""

    def start(self) -> None:
        """Begin to get ready, without waiting for it. A worker that is ready takes tiles."""

    def wait_until_ready(self) -> None:
        """Return when the device is ready; raise DeviceStartError if it cannot be used."""

    def join(self) -> None:
        """Return when the worker has ended, which it does once the queue is closed and its batches are finished."""
