"""Server-wide options, from ``LMDEPLOY_VICO_<NAME>`` or ``--hf-overrides '{"vico": {"<name>": ...}}'``."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_vico.host_memory import total_memory
from lmdeploy_vico.kernels.implementation import AUTO, CHOICES
from lmdeploy_vico.vision.model.speedups import NO_SPEEDUPS, Speedups, parse_speedups
from lmdeploy_vico.vision.routing import Compression, parse_compression

PREFIX = 'LMDEPLOY_VICO_'
OVERRIDES_KEY = 'vico'
LEAST = {'max_tiles': 1, 'preprocess_threads': 1, 'tile_batch': 0, 'max_queued_tiles': 1}
LEAST |= {'max_decoded_bytes': 1, 'cache_bytes': 0}
FLAGS = ('dummy_weights', 'synthetic_images')
_TRUTH = {'0': False, '1': True, 'false': False, 'true': True}


class OptionError(ValueError):
    """An unknown option or a bad value; the message names it and what is accepted."""


def _default_threads() -> int:
    return min(os.cpu_count() or 1, 16)


def _default_cache_bytes() -> int:
    return min(4 * 2**30, total_memory() // 16)


def _default_decoded_bytes() -> int:
    return min(16 * 2**30, total_memory() // 8)


@dataclass(frozen=True)
class Options:
    """What an operator can set.

    Attributes:
        compression: for requests that do not say: "auto" (the checkpoint's thresholds), "none", "all" or a share.
        max_tiles: the most tiles an image may be cut into, without its thumbnail, whatever a client or the checkpoint
            asks for (``max_dynamic_patch``).
        preprocess_threads: threads that resize and cut images; Pillow releases the GIL.
        vision_device: where the vision side runs: "auto" (each device that the engine of this server uses, or the CPU),
            "cpu", "cuda:1", or several devices that share the work, "cuda:0,cuda:1".
        tile_batch: tiles per device batch; 0 chooses for the ViT's width and the device.
        max_queued_tiles: tiles that may wait to be encoded; beyond, requests with images are answered with a 503.
        max_decoded_bytes: host memory for decoded images and video frames; a request that alone needs more is answered
            with a 400, one that finds no room beside the others with a 503.
        cache_bytes: host memory for the ViT-level results of tiles that may be asked about again; 0 keeps none.
        kernels: what computes the vision kernels: "auto" (Triton on CUDA devices, torch elsewhere), "triton", "torch".
        vit_speedups: faster ways to compute parts of the ViT, a comma-separated list of "cudnn_attention",
            "residual_norm", "padded_patches" and "strided_qk_norm"; none by default (see vision/model/speedups.py).
        dummy_weights: make all weights up instead of reading them, for measuring: the answers mean nothing.
        synthetic_images: let an image item ask for made-up visual tokens, for measuring the language model alone.
    """

    compression: Compression = 'auto'
    max_tiles: int = 40
    preprocess_threads: int = dataclasses.field(default_factory=_default_threads)
    vision_device: str = 'auto'
    tile_batch: int = 0
    max_queued_tiles: int = 2048
    max_decoded_bytes: int = dataclasses.field(default_factory=_default_decoded_bytes)
    cache_bytes: int = dataclasses.field(default_factory=_default_cache_bytes)
    kernels: str = AUTO
    vit_speedups: Speedups = NO_SPEEDUPS
    dummy_weights: bool = False
    synthetic_images: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, 'compression', parse_compression(self.compression))
            object.__setattr__(self, 'vit_speedups', parse_speedups(self.vit_speedups))
        except ValueError as error:
            raise OptionError(str(error)) from error
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f'{name} must be an integer of at least {least}, not {value!r}.')
        for name in FLAGS:
            object.__setattr__(self, name, _parse_flag(name, getattr(self, name)))
        if self.kernels not in CHOICES:
            raise OptionError(f'kernels must be one of {", ".join(CHOICES)}, not {self.kernels!r}.')
        if not isinstance(self.vision_device, str) or not self.vision_device:
            raise OptionError(f'vision_device must be "auto" or a device like "cuda:0", not {self.vision_device!r}.')

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> 'Options':
        """Read the options; ``--hf-overrides`` wins over the environment.

        Args:
            overrides: what ``--hf-overrides`` was given, or None.
            environ: by default the process's environment.

        Raises:
            OptionError: an unknown name or a bad value.
        """
        values = environment_options(environ)
        section = (overrides or {}).get(OVERRIDES_KEY, {})
        if not isinstance(section, Mapping):
            raise OptionError(f'--hf-overrides: "{OVERRIDES_KEY}" must be an object, not {section!r}.')
        for name, value in section.items():
            _check_name(name, f'--hf-overrides "{OVERRIDES_KEY}" {name!r}')
            values[name] = value
        return cls(**values)


def environment_options(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options that the environment sets, by name; raises OptionError for an unknown one."""
    values: dict[str, Any] = {}
    for variable, text in (os.environ if environ is None else environ).items():
        if variable.startswith(PREFIX):
            name = variable[len(PREFIX) :].lower()
            _check_name(name, variable)
            values[name] = _parse_text(name, text)
    return values


def _parse_flag(name: str, value: Any) -> bool:
    truth = _TRUTH.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if truth is None:
        raise OptionError(f'{name} must be 0, 1, true or false, not {value!r}.')
    return truth


def _check_name(name: str, given: str) -> None:
    known = [field.name for field in dataclasses.fields(Options)]
    if name not in known:
        raise OptionError(f'{given} is not an option; the options are {", ".join(known)}.')


def _parse_text(name: str, text: str) -> Any:
    if name == 'vision_device':
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
