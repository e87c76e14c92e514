"""What a stage needs of a worker, and what a worker needs of the encoder of its device.

Nothing here assumes that the device is in this process. Tiles leave in device batches, as uint8 pixels; features and
scores come back in host memory; a prompt is routed where its scores are, at home; its visual tokens come back once,
when they have been projected. For a device in another process, or on another machine, there are two ways:

- an encoder whose :meth:`DeviceEncoder.start` sends a batch away and whose :meth:`DeviceEncoder.visual_tokens` routes
  here and sends only the routed tiles to be projected. :class:`~lmdeploy_vico.stage.workers.thread.DeviceThread` drives
  it as it drives a device of this process;
- another :class:`Worker`, which takes tiles from :class:`~lmdeploy_vico.stage.work.Work` and returns them to it.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import TileFeatures
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import RoutingGroup


class DeviceBatch(Protocol):
    """A device batch that has been started."""

    @property
    def seconds(self) -> float:
        """How long the device took, known once :meth:`wait` has returned."""

    def wait(self) -> TileFeatures:
        """Return the features and scores of the batch's tiles when they are in host memory; raise what failed."""


class DeviceEncoder(Protocol):
    """The vision side of a checkpoint on one device. One worker uses it, from one thread."""

    @property
    def device(self) -> torch.device:
        """Where it encodes. Log and error messages name it."""

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
