"""Weights straight from a checkpoint's safetensors shards, checked before anything is read; or made up."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lmdeploy_vico.config import UnsupportedCheckpointError

INDEX_FILE = 'model.safetensors.index.json'
SINGLE_FILE = 'model.safetensors'

Shape = tuple[int, ...]

# As safetensors names them. Of anything narrower the values mean nothing without scales, which nobody applies here;
# nothing wider is published.
FLOATS = ('F32', 'F16', 'BF16')
QUANTISED = ('qweight', 'weight_packed')  # what a layer has in place of its weight: AWQ and GPTQ; compressed-tensors
NAMED = 3  # quantised tensors that a message names; a checkpoint has them by the hundred


class NoWeightsError(UnsupportedCheckpointError):
    """The checkpoint directory holds no weights at all."""


class Weights(Protocol):
    """Where a module's parameters come from."""

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Raise :class:`UnsupportedCheckpointError` unless every expected tensor is there and not quantised."""

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``."""


class Checkpoint:
    """The tensors of a checkpoint directory: where each lies, its shape and type, from the shards' headers alone.

    Attributes:
        shapes: of every tensor.
        dtypes: of every tensor, as safetensors names them: BF16, F8_E4M3, I32, ...

    Raises:
        UnsupportedCheckpointError: the directory holds no safetensors, or a shard is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for shard in self._shard_files():
            try:
                with safe_open(shard, framework='pt') as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                        self._shards[name] = shard
                        header = tensors.get_slice(name)
                        self.shapes[name] = tuple(header.get_shape())
                        self.dtypes[name] = header.get_dtype()
            except (OSError, SafetensorError) as error:
                raise UnsupportedCheckpointError(f'{shard} cannot be read: {error}.') from error

    def _shard_files(self) -> list[Path]:
        index = self.path / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text())['weight_map']
            return [self.path / name for name in sorted(set(weight_map.values()))]
        if (self.path / SINGLE_FILE).is_file():
            return [self.path / SINGLE_FILE]
        raise NoWeightsError(f'{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}.')

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Check tensors that have to be stored as float32, float16 or bfloat16.

        Args:
            expected: their names and shapes.
            part: of the model, for the message.

        Raises:
            UnsupportedCheckpointError: some are quantised, or else missing or misshapen. The message names the first
                few of the quantised, and all others.
        """
        quantised = [found for name in sorted(expected) if (found := self._quantised(name))]
        if quantised:
            more = f' and {len(quantised) - NAMED} more' if len(quantised) > NAMED else ''
            raise UnsupportedCheckpointError(
                f'{self.path}: quantised tensors of the {part} cannot be used: {", ".join(quantised[:NAMED])}{more}. '
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
        """How a tensor is stored if that is not one of :data:`FLOATS`, in words; None for one that is missing."""
        if name in self.dtypes:
            return None if self.dtypes[name] in FLOATS else f'{name} is {self.dtypes[name]}'
        if not name.endswith('.weight'):
            return None
        instead = (name.removesuffix('weight') + kind for kind in QUANTISED)
        return next((f'{name} is stored as {found}' for found in instead if found in self.dtypes), None)

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``, named and shaped as here, casting to the parameter's dtype."""
        parameters = dict(module.named_parameters())
        by_shard: dict[Path, list[str]] = {}
        for name in parameters:
            by_shard.setdefault(self._shards[name], []).append(name)
        for shard, names in by_shard.items():
            with safe_open(shard, framework='pt') as tensors, torch.no_grad():
                for name in names:
                    parameters[name].copy_(tensors.get_tensor(name))


class DummyWeights:
    """Weights that are made up where they are needed, in no time and with no file: for measuring, not for answers."""

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Nothing to check: whatever is expected will be there."""

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``."""
        fill_with_noise(module.named_parameters())


@torch.inference_mode()
def fill_with_noise(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill parameters, on the device where they are, with what keeps activations finite and inputs distinguishable.

    Vectors are 1 (norms, layer scales) or 0 (biases); matrices are normal, scaled by their fan-in. The same name, shape
    and device give the same values, in every process: what tensor-parallel ranks hold in common stays equal.
    """
    for name, parameter in parameters:
        if name.endswith('bias'):
            parameter.zero_()
        elif parameter.dim() < 2:
            parameter.fill_(1)
        else:
            # A convolution adds up over all but its output channels; stacked experts, like plain matrices, over the
            # last dimension.
            fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(std=fan_in**-0.5, generator=generator)
