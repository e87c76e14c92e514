"""What operators and clients may choose about the vision side. Imports nothing heavy: the options are made of these."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, cast

from lmdeploy_vico.wording import shown


@dataclass(frozen=True)
class Experiment:
    """A way to choose tiles that is there to be compared with the router's: the ablations of the paper's section 4.

    Attributes:
        kind: ``random`` compresses a share of the tiles, whatever they show; ``image`` compresses an image whole, where
            the mean of its tiles' scores is high enough.
        value: the share, or the least mean score, from 0 to 1.
    """

    kind: Literal['random', 'image']
    value: float

    def __str__(self) -> str:
        return f'{self.kind}:{self.value:g}'


@dataclass(frozen=True)
class Pressed:
    """A compression, and more of it while the language model is overloaded. Servers make these, clients cannot.

    Attributes:
        base: what decides first.
        extra: a share of all tiles: so many more are compressed, rounded down, those with the highest scores among the
            others.
    """

    base: 'Compression'
    extra: float


Compression: TypeAlias = Literal['auto', 'none', 'all'] | float | Experiment | Pressed

# Whose tiles are compared with each other: those of all images of a prompt (the published rule), or of one image.
ROUTING_SCOPES = ('prompt', 'image')

# What runs the language model: LMDeploy's PyTorch engine, or its engine in C++.
PYTORCH, TURBOMIND = LANGUAGE_ENGINES = ('pytorch', 'turbomind')

COMPRESSIONS = '"auto", "none", "all", or a number from 0 to 1 (the share of tiles to compress)'
EXPERIMENT = re.compile(r'(random|image):(\d*\.?\d+)')


def parse_compression(value: object, source: str = 'compression') -> Compression:
    """Check a value from a request, an option or a caller.

    Raises:
        ValueError: naming ``source`` and the accepted values.
    """
    if isinstance(value, Experiment):
        return value
    if isinstance(value, str):
        named = EXPERIMENT.fullmatch(value)
        if named and float(named[2]) <= 1:
            return Experiment(cast(Literal['random', 'image'], named[1]), float(named[2]))
        if value in ('auto', 'none', 'all'):
            return cast(Literal['auto', 'none', 'all'], value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f'{source} must be {COMPRESSIONS}, not {shown(value)}.')


def typed(text: str) -> str | float:
    """What a command line's word is in a request: a number, or a name."""
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Speedups:
    """Faster ways to compute parts of the ViT, and which of them are on; see vision/model/speedups.py.

    Attributes:
        cudnn_attention: cuDNN's attention instead of FlashAttention 2, on Hopper GPUs.
        residual_norm: layer scale, residual and the next norm in one Triton kernel.
        padded_patches: the rows of the patch embedding's product padded from 588 to 592 values, a multiple of 16 bytes.
        strided_qk_norm: q and k normalised where the fused projection wrote them, by a Triton kernel; of a ViT that
            normalises them (6B).
    """

    cudnn_attention: bool = False
    residual_norm: bool = False
    padded_patches: bool = False
    strided_qk_norm: bool = False

    def names(self) -> Iterator[str]:
        """The names of those that are on."""
        return (name for name in SPEEDUPS if getattr(self, name))

    def __bool__(self) -> bool:
        return any(self.names())

    def __str__(self) -> str:
        return ','.join(self.names())


SPEEDUPS = tuple(field.name for field in fields(Speedups))
NO_SPEEDUPS = Speedups()


def parse_speedups(value: object) -> Speedups:
    """Read a comma-separated list of names, empty for none; raises ValueError for anything else."""
    if isinstance(value, Speedups):
        return value
    names = [name.strip() for name in value.split(',')] if isinstance(value, str) else [repr(value)]
    names = [name for name in names if name]
    unknown = [name for name in names if name not in SPEEDUPS]
    if unknown:
        raise ValueError(
            f'vit_speedups must be a comma-separated list of {", ".join(SPEEDUPS)}, or empty, not {", ".join(unknown)}.'
        )
    return Speedups(**dict.fromkeys(names, True))
