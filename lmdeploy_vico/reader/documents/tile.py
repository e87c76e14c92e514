"""What a tile is made of: pixels, questions, and what every patch of the ViT shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

SIZE = 448  # pixels of a tile's side
PATCH = 14  # pixels of a patch's side
PATCHES = SIZE // PATCH  # of a tile's side

Pixels: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = dict[str, NDArray[np.int64]]

HEADS = ('glyph', 'key', 'place', 'shape', 'colour', 'photo')  # what a patch may be asked for


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: what is asked.
        answer: the right answer.
        kind: of the tile that has it.
    """

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Entry:
    """A printed entry.

    Attributes:
        question: what asks for its code.
        code: digits.
        rows, columns: the patches that it covers.
    """

    question: str
    code: str
    rows: slice
    columns: slice


@dataclass
class Tile:
    """One tile of a picture.

    Attributes:
        pixels: RGB, float32 ``[448, 448, 3]`` from 0 to 255.
        questions: what can be asked about it.
        entries: that are printed on it.
        labels: for each of :data:`HEADS` int64 ``[32, 32]``: what a patch shows, 0 for nothing.
    """

    pixels: Pixels
    questions: list[Question] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    labels: Labels = field(default_factory=lambda: {name: np.zeros((PATCHES, PATCHES), np.int64) for name in HEADS})

    def mark(self, rows: slice, columns: slice, values: Mapping[str, Any]) -> None:
        """Note what the patches of a rectangle show."""
        for name, value in values.items():
            self.labels[name][rows, columns] = value

    def mark_pixels(self, left: int, top: int, side: int, values: Mapping[str, Any]) -> None:
        """Note what those patches show that lie in a square of pixels as a whole."""
        rows, columns = (slice(-(-start // PATCH), (start + side) // PATCH) for start in (top, left))
        self.mark(rows, columns, values)


def blank(rng: np.random.Generator) -> tuple[Tile, bool]:
    """Return an empty page, plain or with a gradient, and whether it is light."""
    light = bool(rng.random() < 0.8)
    base = rng.uniform(200, 255, 3) if light else rng.uniform(0, 60, 3)
    pixels = np.broadcast_to(base.astype(np.float32), (SIZE, SIZE, 3)).copy()
    if rng.random() < 0.4:
        gradient = np.linspace(-20, 20, SIZE, dtype=np.float32) * rng.choice([-1, 1])
        pixels += gradient[:, None, None] if rng.random() < 0.5 else gradient[None, :, None]
    return Tile(pixels), light


def with_noise(rng: np.random.Generator, pixels: Pixels) -> NDArray[np.uint8]:
    """Add the noise of a camera, the same in all channels, and round; uint8 ``[448, 448, 3]``."""
    noise = rng.normal(0, rng.uniform(0, 6), (SIZE, SIZE, 1))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)
