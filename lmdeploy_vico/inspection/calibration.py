"""Which thresholds compress how much of an operator's pictures.

The routing rule compresses a tile whose score is above its prompt's quantile and at least the absolute threshold. The
quantile is left as the checkpoint has it, since it says which tiles can be compressed at all; the absolute threshold is
what is set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.vision.routing import route

SAVED = 1 - TOKENS_COMPRESSED / TOKENS_FULL  # of the visual tokens, where all tiles are compressed
DIGITS = 6  # of a threshold, as it is printed and given to a server
CURVE = 10  # points of a curve, beside those that are asked for


@dataclass(frozen=True)
class Scored:
    """The tiles of one prompt.

    Attributes:
        name: of the picture, or index of the question.
        kind: of the picture.
        scores: the router's, one a tile.
    """

    name: str
    kind: str
    scores: Sequence[float]


@dataclass(frozen=True)
class Point:
    """What an absolute threshold does.

    Attributes:
        threshold: from this score on, tiles are compressed.
        compressed: tiles.
        tiles: all there are.
    """

    threshold: float
    compressed: int
    tiles: int

    @property
    def share(self) -> float:
        """Of the tiles, how many are compressed."""
        return self.compressed / self.tiles

    @property
    def saved(self) -> float:
        """Of the visual tokens, how many are saved."""
        return SAVED * self.share

    def as_json(self) -> dict[str, float]:
        """Threshold, and shares of tiles and tokens."""
        return {
            'absolute_threshold': self.threshold,
            'compressed_tiles': round(self.share, 4),
            'tokens_saved': round(self.saved, 4),
        }


class Calibration:
    """The pictures of an operator, ready for the question what a threshold does to them.

    Args:
        prompts: with their scores; each is routed by itself.
        relative_threshold: the quantile of the routing rule.
    """

    def __init__(self, prompts: Sequence[Scored], relative_threshold: float) -> None:
        self.prompts, self.relative_threshold = prompts, relative_threshold
        self._tiles = sum(len(prompt.scores) for prompt in prompts)
        found = (
            score
            for prompt in prompts
            for score, above in zip(prompt.scores, self._above(prompt), strict=True)
            if above
        )
        self._scores = np.array(sorted(found, reverse=True))  # of the tiles that can be compressed

    def _above(self, prompt: Scored) -> list[bool]:
        return self.chosen(prompt, 0.0)

    def chosen(self, prompt: Scored, threshold: float) -> list[bool]:
        """Which tiles of a prompt are compressed at an absolute threshold."""
        scores = torch.tensor(prompt.scores, dtype=torch.float32)
        compressed: list[bool] = route(scores, 'auto', self.relative_threshold, threshold).tolist()
        return compressed

    @property
    def most(self) -> Point:
        """What the lowest threshold does: no other compresses more."""
        return self.at(0.0)

    def at(self, threshold: float) -> Point:
        """What a threshold does to all pictures."""
        return Point(threshold, int((self._scores >= np.float32(threshold)).sum()), self._tiles)

    def by_kind(self, threshold: float) -> Mapping[str, Point]:
        """What it does to each kind of picture."""
        kinds: dict[str, list[Scored]] = {}
        for prompt in self.prompts:
            kinds.setdefault(prompt.kind, []).append(prompt)
        return {
            kind: Point(
                threshold,
                sum(sum(self.chosen(prompt, threshold)) for prompt in these),
                sum(len(prompt.scores) for prompt in these),
            )
            for kind, these in sorted(kinds.items())
        }

    def nearest(self, target: float) -> Point:
        """The threshold that compresses as near to a share of all tiles as any does.

        It lies halfway between two scores, so that rounding moves no tile.
        """
        wanted = target * self._tiles
        # How many tiles are compressed when the threshold lies under each of the different scores, or above all.
        under = np.flatnonzero(np.diff(self._scores, append=-np.inf)) + 1
        counts = np.array([0, *under])
        count = int(counts[np.argmin(np.abs(counts - wanted))])
        above = self._scores[count - 1] if count else 1.0
        below = self._scores[count] if count < len(self._scores) else 0.0
        return self.at(round((float(above) + float(below)) / 2, DIGITS))

    def curve(self) -> list[Point]:
        """Thresholds that compress evenly spaced shares of the tiles, from none to as many as can be."""
        points = {self.nearest(self.most.share * step / CURVE).compressed: step for step in range(CURVE + 1)}
        return [self.nearest(self.most.share * step / CURVE) for step in sorted(points.values())]
