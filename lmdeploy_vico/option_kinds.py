"""What values the options of a server take: how each kind is checked, and said in words."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_vico.choices import (
    COMPRESSIONS,
    LANGUAGE_ENGINES,
    ROUTING_SCOPES,
    SPEEDUPS,
    parse_compression,
    parse_speedups,
)
from lmdeploy_vico.kernels.choice import CHOICES

_TRUTH = {'0': False, '1': True, 'false': False, 'true': True}


@dataclass(frozen=True)
class Kind:
    """What values an option takes.

    Attributes:
        accepted: the values in words, after "must be".
        parse: the value that the option gets; raises ValueError for one that is not accepted.
        numeric: whether the text of an environment variable that looks like a number is one.
    """

    accepted: str
    parse: Callable[[Any], Any]
    numeric: bool = True


def at_least(least: int) -> Kind:
    """The integers from ``least`` on."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(value)
        return value

    return Kind(f'an integer of at least {least}', parse)


def _parse_flag(value: Any) -> bool:
    truth = _TRUTH.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if truth is None:
        raise ValueError(value)
    return truth


def _one_of(choices: Sequence[str]) -> Kind:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return Kind(f'one of {", ".join(choices)}', parse, numeric=False)


def _parse_devices(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float('inf'):
        raise ValueError(value)
    return float(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(value)
    return float(value)


def _parse_directory(value: Any) -> str:
    if not isinstance(value, str) or (value and not os.path.isdir(value)):
        raise ValueError(value)
    return value


COMPRESSION = Kind(COMPRESSIONS, parse_compression)
FLAG = Kind('0, 1, true or false', _parse_flag)
KERNELS = _one_of(CHOICES)
SCOPES = _one_of(ROUTING_SCOPES)
ENGINES = _one_of(LANGUAGE_ENGINES)
ENCODING = '"auto", devices like "cuda:0,cuda:1" or "cpu", or "ray:auto" or "ray:<host>:<port>"'
DEVICES = Kind(ENCODING, _parse_devices, numeric=False)
SHARE = Kind('a number from 0 to 1', _share)
SECONDS = Kind('a number above 0', _seconds)
DIRECTORY = Kind('a directory that exists, or empty', _parse_directory, numeric=False)
NAMES = Kind(f'a comma-separated list of {", ".join(SPEEDUPS)}, or empty', parse_speedups, numeric=False)
