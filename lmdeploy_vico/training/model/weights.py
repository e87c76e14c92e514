"""Weights of the model from checkpoints and back: the published names, in which every expert has its own tensors."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.checkpoints.names import Shape
from lmdeploy_vico.config import UnsupportedCheckpointError

_EXPERTS = re.compile(r'(.*\.mlp\.experts)\.(gate_up_proj|down_proj)')
TYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
# What the tensor of all experts is made of, for each expert, one below the other.
_STACKED = {'gate_up_proj': ('gate_proj', 'up_proj'), 'down_proj': ('down_proj',)}


class Tensors:
    """The tensors of checkpoints by published name, read one at a time; of several that have one, the first's.

    Raises:
        UnsupportedCheckpointError: a directory is no checkpoint.
    """

    def __init__(self, *directories: Path) -> None:
        self._checkpoints = [Checkpoint(directory) for directory in directories]
        self._files: dict[Path, Any] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for checkpoint in reversed(self._checkpoints):
            self.shapes |= checkpoint.shapes
            self.dtypes |= checkpoint.dtypes

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        tensor: torch.Tensor = self._file_of(name).get_tensor(name)
        return tensor

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor as they are stored; no others are read."""
        part: torch.Tensor = self._file_of(name).get_slice(name)[rows]
        return part

    def _file_of(self, name: str) -> Any:
        """The file that holds a tensor. It stays open: it may hold hundreds of experts."""
        path = next(one for one in self._checkpoints if name in one.shapes).file_of(name)
        if path not in self._files:
            self._files[path] = safe_open(path, framework='pt')
        return self._files[path]

    def require(self, expected: dict[str, Shape]) -> None:
        """Raise UnsupportedCheckpointError unless all are there, unquantised, with these shapes."""
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            where = ' and '.join(str(one.path) for one in self._checkpoints)
            raise UnsupportedCheckpointError(f'{where}: missing tensors: {", ".join(sorted(missing)[:10])}.')
        for checkpoint in self._checkpoints:
            checkpoint.require({name: shape for name, shape in expected.items() if name in checkpoint.shapes}, 'model')


def published_names(name: str, shape: Sequence[int]) -> list[list[str]]:
    """The published tensors that a parameter is made of: rows of each expert, or one row with one name.

    Args:
        name: the parameter's.
        shape: the parameter's; the first dimension of an experts' tensor counts them.
    """
    found = _EXPERTS.fullmatch(name)
    if not found:
        return [[name]]
    return [[f'{found[1]}.{expert}.{part}.weight' for part in _STACKED[found[2]]] for expert in range(shape[0])]


def assemble(name: str, shape: Sequence[int], tensors: Tensors) -> torch.Tensor:
    """A parameter's value from the published tensors."""
    rows = [torch.cat([tensors.read(part) for part in row]) for row in published_names(name, shape)]
    return torch.stack(rows) if _EXPERTS.fullmatch(name) else rows[0]


def disassemble(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The published tensors of a parameter's value, with their names."""
    rows = published_names(name, value.shape)
    for row, part in zip(rows, value if _EXPERTS.fullmatch(name) else [value], strict=True):
        yield from zip(row, part.chunk(len(row)), strict=True)


def published_shapes(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Shape]:
    """Name and shape of every published tensor that parameters are made of."""
    return {
        part: tuple(value.shape)
        for name, parameter in parameters
        if not is_adapter(name)
        for part, value in disassemble(plain_name(name), torch.empty(parameter.shape, device='meta'))
    }


@torch.no_grad()
def load(parameters: Iterable[tuple[str, nn.Parameter]], tensors: Tensors) -> None:
    """Fill parameters, cast to their dtype; of a sharded one, every process keeps its own shard.

    It reads no more than that, but of experts, whose tensors are stacked: these are read whole.

    Args:
        parameters: by the names of :func:`plain_name`; those of adapters are left as they are.
        tensors: that have all of them.
    """
    for name, parameter in parameters:
        if is_adapter(name):
            continue
        published, own = plain_name(name), own_rows(parameter)
        if own is None or _EXPERTS.fullmatch(published):
            assign(parameter, assemble(published, parameter.shape, tensors))
        elif len(own[0]):
            shard, rows = own
            shard.copy_(tensors.read_rows(published, rows))


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, slice] | None:
    """This process's shard of a tensor that is sharded by rows, and which rows these are; None of any other tensor."""
    if not isinstance(tensor, DTensor) or tensor.placements != (Shard(0),):
        return None
    shard, mesh = tensor.to_local(), tensor.device_mesh
    first = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())  # as torch.chunk divides them
    return shard, slice(first, first + len(shard))


@torch.no_grad()
def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter a value, cast to its type; every process keeps its shard of a whole one."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = value.to(parameter.device, parameter.dtype)
        parameter.to_local().copy_(distribute_tensor(value, mesh, placements, src_data_rank=None).to_local())
    else:
        parameter.copy_(value)


@torch.no_grad()
def round_as_stored(parameters: Iterable[tuple[str, nn.Parameter]], tensors: Tensors) -> None:
    """Give parameters the values that they will have when they are written with the types of ``tensors``.

    What is judged, and what thresholds are chosen by, is then what is served. Adapters are left alone: they are rounded
    together with what they are merged into, see :func:`~lmdeploy_vico.training.model.writer.publish_model`.
    """
    for name, parameter in parameters:
        if not is_adapter(name):
            [first, *_], *_ = published_names(plain_name(name), parameter.shape)
            parameter.copy_(parameter.to(TYPES[tensors.dtypes[first]]))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_adapter(name: str) -> bool:
    """Whether a parameter is a LoRA adapter's."""
    return '.lora_' in name


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace('.base_layer.', '.')
