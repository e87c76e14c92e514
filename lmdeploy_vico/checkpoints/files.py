"""Weights read from a checkpoint's safetensors files, whose headers are checked before any tensor is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn

from lmdeploy_vico.checkpoints.names import Shape
from lmdeploy_vico.checkpoints.safetensors_format import (
    FLOATS,
    INDEX_FILE,
    SINGLE_FILE,
    DamagedFileError,
    read_header,
    shard_files,
)
from lmdeploy_vico.config import UnsupportedCheckpointError

_QUANTISED = ('qweight', 'weight_packed')  # what a layer has instead of its weight: AWQ and GPTQ; compressed-tensors
_NAMED = 3  # how many quantised tensors a message names; a checkpoint has hundreds


class NoWeightsError(UnsupportedCheckpointError):
    """The checkpoint directory holds no weights at all."""


class Weights(Protocol):
    """Where a module's parameters come from."""

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Raise :class:`UnsupportedCheckpointError` unless every expected tensor is there and not quantised."""

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``."""


class Checkpoint:
    """The tensors of a checkpoint directory, as the headers of its safetensors files describe them.

    Attributes:
        shapes: the shape of every tensor.
        dtypes: the type of every tensor, as safetensors names it: BF16, F8_E4M3, I32, ...
        sizes: the size of every tensor in bytes.

    Raises:
        NoWeightsError: the directory holds no safetensors files.
        UnsupportedCheckpointError: a file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        files = shard_files(self.path)
        if not files:
            raise NoWeightsError(f'{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}.')
        for file in files:
            try:
                with file.open('rb') as opened:
                    tensors, _ = read_header(opened)
            except (OSError, DamagedFileError) as error:
                raise UnsupportedCheckpointError(f'{file} cannot be read: {error}.') from error
            for name, tensor in tensors.items():
                self._files[name] = file
                self.shapes[name], self.dtypes[name], self.sizes[name] = tensor.shape, tensor.dtype, tensor.nbytes

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Check tensors that have to be stored as float32, float16 or bfloat16.

        Args:
            expected: their names and shapes.
            part: of the model, for the message.

        Raises:
            UnsupportedCheckpointError: some are quantised, missing or misshapen. If some are quantised, the message
                names the first few of them; otherwise it names all that are missing or misshapen.
        """
        quantised = [found for name in sorted(expected) if (found := self._quantised(name))]
        if quantised:
            more = f' and {len(quantised) - _NAMED} more' if len(quantised) > _NAMED else ''
            raise UnsupportedCheckpointError(
                f'{self.path}: quantised tensors of the {part} cannot be used: {", ".join(quantised[:_NAMED])}{more}. '
                'Use a checkpoint in which they are float32, float16 or bfloat16.'
            )
        self.require_shapes(expected)

    def require_shapes(self, expected: Mapping[str, Shape]) -> None:
        """Raise :class:`UnsupportedCheckpointError` naming every expected tensor that is missing or misshapen."""
        missing = [name for name in expected if name not in self.shapes]
        misshapen = [
            f'{name} is {list(self.shapes[name])}, expected {list(shape)}'
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != tuple(shape)
        ]
        problems = []
        if missing:
            problems.append('missing tensors: ' + ', '.join(sorted(missing)))
        if misshapen:
            problems.append('misshapen tensors: ' + '; '.join(sorted(misshapen)))
        if problems:
            raise UnsupportedCheckpointError(f'{self.path} is incomplete: ' + '; '.join(problems) + '.')

    def _quantised(self, name: str) -> str | None:
        """Say how a quantised tensor is stored; None for one that is a plain float, or missing."""
        if name in self.dtypes:
            return None if self.dtypes[name] in FLOATS else f'{name} is {self.dtypes[name]}'
        if not name.endswith('.weight'):
            return None
        instead = (name.removesuffix('weight') + kind for kind in _QUANTISED)
        return next((f'{name} is stored as {found}' for found in instead if found in self.dtypes), None)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        with safe_open(self._files[name], framework='pt') as tensors:
            return tensors.get_tensor(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``, whose names and shapes are the checkpoint's; cast to their dtype."""
        parameters = dict(module.named_parameters())
        by_file: dict[Path, list[str]] = {}
        for name in parameters:
            by_file.setdefault(self._files[name], []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework='pt') as tensors, torch.no_grad():
                for name in names:
                    parameters[name].copy_(tensors.get_tensor(name))
