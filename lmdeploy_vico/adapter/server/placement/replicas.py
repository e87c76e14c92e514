"""The vision side on each of its devices: its weights are read once and copied, and too little memory is reported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lmdeploy_vico.checkpoints.files import Weights
from lmdeploy_vico.checkpoints.names import Shape
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.kernels.implementation import refusal
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.stage.errors import DeviceStartError
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tile_encoder import TileEncoder

WEIGHT_BYTES = 2  # of a value on a CUDA device: bfloat16 or float16
# Words in the errors of CUDA's libraries and Triton. PyTorch's own allocations raise OutOfMemoryError.
OUT_OF_MEMORY = ('out of memory', 'ALLOC_FAILED')


class CopiedWeights:
    """The weights of a vision side that is loaded already, copied bit for bit from its device.

    Some of its parameters have been cast to float32 (``VisionTower.freeze``), which keeps their values.
    """

    def __init__(self, source: nn.Module) -> None:
        self._source = source

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Check nothing: the source's weights have been checked."""

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``, whose dtype is that in which the source was loaded."""
        source = dict(self._source.named_parameters())
        for name, parameter in module.named_parameters():
            if source[name].shape != parameter.shape:  # copy_ would broadcast it
                raise ValueError(f'{name} is {list(source[name].shape)} in the source, not {list(parameter.shape)}')
            parameter.copy_(source[name])


@dataclass(frozen=True)
class FreeMemory:
    """Free and total memory of a device, in bytes."""

    free: int
    total: int


class Replicas:
    """The vision side on each of ``devices``, loaded and ready for a stage.

    The checkpoint is read for the first device; the others copy from it.

    Attributes:
        encoders: one for each device.
        before: free memory of each device before its vision side was loaded.

    Args:
        weights: of the checkpoint.
        config: the vision side's.
        devices: all of one kind.
        options: the server's, of which ``tile_batch`` and ``vit_speedups`` are used.
        graph: whether a CUDA graph is captured on each device.

    Raises:
        OptionError: a device has too little memory, or cannot run the kernels that are asked for.
    """

    def __init__(
        self,
        weights: Weights,
        config: VicoConfig,
        devices: Sequence[torch.device],
        options: Options,
        graph: bool,
    ) -> None:
        self._config, self._options = config, options
        self._devices = devices
        self.encoders: list[TileEncoder] = []
        self.before: dict[torch.device, FreeMemory] = {}
        for device in devices:
            with self.fitting(device):
                self.before[device] = free_memory(device)
                if refused := refusal(device):
                    raise OptionError(refused, 'kernels')
                encoder = TileEncoder.load(
                    CopiedWeights(self.encoders[0].tower) if self.encoders else weights,
                    *(config, device, None, options.tile_batch or None, graph, options.vit_speedups),
                )
                self.encoders.append(encoder)

    @contextmanager
    def fitting(self, device: torch.device | None = None) -> Iterator[None]:
        """Raise an OptionError that says what to set if a device runs out of memory inside the block.

        Args:
            device: by default the one that a :class:`DeviceStartError` names.
        """
        try:
            yield
        except Exception as error:
            where = error.device if isinstance(error, DeviceStartError) else device
            if not isinstance(where, torch.device) or where.type != 'cuda' or not is_out_of_memory(error):
                raise
            raise OptionError(self._does_not_fit(where)) from error

    def _does_not_fit(self, device: torch.device) -> str:
        with torch.device('meta'):
            weights = sum(weight.numel() for weight in VisionTower(self._config).parameters())
        needed = weights * WEIGHT_BYTES
        memory = self.before.get(device)
        there = (
            'no memory at all was free'
            if memory is None
            else f'{memory.free / GIB:.1f} of its {memory.total / GIB:.1f} GiB were free'
        )
        return (
            f'The vision side does not fit on {device}: its weights take {needed / GIB:.1f} GiB, besides working '
            f'memory, and {there}: set vision_device to devices with more free memory (it is '
            f'{self._options.vision_device!r} now, which is {", ".join(map(str, self._devices))}), or make tile_batch '
            'smaller.'
        )


def free_memory(device: torch.device) -> FreeMemory:
    """Return the memory of a device now; zeros for a CPU.

    Asking a CUDA device creates a context of some hundred MiB on it: ask only devices of the vision side.
    """
    return FreeMemory(*torch.cuda.mem_get_info(device)) if device.type == 'cuda' else FreeMemory(0, 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that a device is out of memory.

    An allocation that fails while a graph is captured arrives as a failure of the capture.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
