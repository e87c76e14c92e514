"""Codes: what is printed beside key letters. Any digits may stand there, so no answer can be known by heart."""

from enum import Enum

import numpy as np

KEYS = 'ABCDEFGH'
DIGITS = '0123456789'
CHARACTERS = DIGITS + KEYS
PRIME, MODULUS, WITHHELD = 7919, 97, 10  # one code in ten is withheld from training


class Split(Enum):
    """Which codes are printed."""

    TRAIN = 'those that are not withheld'
    TEST = 'those that are withheld'


def is_withheld(code: str) -> bool:
    """Return whether a code is never printed in training."""
    return int(code) * PRIME % MODULUS < WITHHELD


def draw_code(rng: np.random.Generator, length: int, split: Split) -> str:
    """Draw a code of ``length`` digits."""
    while True:
        code = ''.join(DIGITS[digit] for digit in rng.integers(0, len(DIGITS), length))
        if is_withheld(code) == (split is Split.TEST):
            return code
