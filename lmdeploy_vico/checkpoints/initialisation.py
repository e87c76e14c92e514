"""Random weights: what a tensor is by its name and shape, and values that keep activations finite at any depth."""

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import nn

from lmdeploy_vico.checkpoints.names import Shape

_LAYER_SCALES = ('.ls1', '.ls2')
# A row of these is looked up; nothing is summed over their width.
_EMBEDDINGS = ('class_embedding', 'position_embedding', 'query_token', 'embed_tokens.weight')
LAYER_SCALE = 0.1


class Kind(Enum):
    """What a tensor does in a model."""

    BIAS = auto()
    LAYER_SCALE = auto()
    NORM = auto()
    EMBEDDING = auto()
    MATRIX = auto()


@dataclass(frozen=True)
class Spread:
    """Standard deviation and mean of a tensor's values."""

    std: float
    mean: float = 0.0


def kind_of(name: str, shape: Shape) -> Kind:
    """Return what a tensor is, by the names of checkpoints and of PyTorch's modules."""
    if name.endswith('bias'):
        return Kind.BIAS
    if name.endswith(_EMBEDDINGS):
        return Kind.EMBEDDING
    if len(shape) > 1:
        return Kind.MATRIX
    return Kind.LAYER_SCALE if name.endswith(_LAYER_SCALES) else Kind.NORM


def fan_in(shape: Shape) -> int:
    """Return over how many products a matrix or a convolution sums for one output.

    A convolution (four dimensions) sums over all but its output channels. Plain matrices and stacked experts sum over
    their last dimension.
    """
    return math.prod(shape[1:]) if len(shape) == 4 else shape[-1]


def spread(name: str, shape: Shape) -> Spread:
    """Return the spread that keeps activations about as large at any depth.

    Matrices get a variance of 1 / fan-in and embeddings one of 1. Biases are 0, layer scales 0.1, norms 1.
    """
    match kind_of(name, shape):
        case Kind.MATRIX:
            return Spread(fan_in(shape) ** -0.5)
        case Kind.EMBEDDING:
            return Spread(1.0)
        case Kind.LAYER_SCALE:
            return Spread(0.0, LAYER_SCALE)
        case Kind.NORM:
            return Spread(0.0, 1.0)
        case Kind.BIAS:
            return Spread(0.0)


def dummy_spread(name: str, shape: Shape) -> Spread:
    """Return the spread of dummy weights: that of :func:`spread`, but layer scales are 1 and embeddings like matrices.

    With token embeddings of a variance of 1 a shallow model would only repeat the token it has just read.
    """
    match kind_of(name, shape):
        case Kind.EMBEDDING:
            return Spread(fan_in(shape) ** -0.5)
        case Kind.LAYER_SCALE:
            return Spread(0.0, 1.0)
        case _:
            return spread(name, shape)


def seed_of(name: str) -> int:
    """Return the seed of a tensor's values, a number of 32 bits that depends on its name alone."""
    return zlib.crc32(name.encode())


@torch.inference_mode()
def fill(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill parameters, on the device where they are, with random values of :func:`dummy_spread`.

    The same name, shape and device type give the same values in every process. So what tensor-parallel ranks hold in
    common stays equal.
    """
    for name, parameter in parameters:
        wanted = dummy_spread(name, tuple(parameter.shape))
        if wanted.std:
            generator = torch.Generator(parameter.device).manual_seed(seed_of(name))
            parameter.normal_(wanted.mean, wanted.std, generator=generator)
        else:
            parameter.fill_(wanted.mean)


class DummyWeights:
    """Random weights that take no file and no time: for measuring, not for answers."""

    def require(self, expected: Mapping[str, Shape], part: str = 'vision side') -> None:
        """Accept anything: whatever is expected will be there."""

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``."""
        fill(module.named_parameters())
