"""What the language model learns to read from: tiles and pages as the frozen ViT sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lmdeploy_vico.config import GRID
from lmdeploy_vico.kernels.pixel_shuffle import merge
from lmdeploy_vico.reader.documents.codes import DIGITS, KEYS, Split
from lmdeploy_vico.reader.documents.page import PRINTS, make_page, make_tile
from lmdeploy_vico.reader.documents.tile import Labels, Question, Tile, with_noise
from lmdeploy_vico.reader.lessons.seeing import crowded_tile
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tiling import cut_tiles

FULL, COMPRESSED = 2, 4  # patches along a side of a visual token
CODE = 4  # digits
FACTS = len(KEYS) + CODE * len(DIGITS)  # what a visual token may have to say: keys, and digits by their place


@dataclass(frozen=True)
class Seen:
    """Something seen.

    Attributes:
        merged: what a projector takes, for each visual token: ``[n, 4 * D]``, or ``[n, 16 * D]`` of compressed tiles.
        facts: float32 ``[n, FACTS]``, 1 for those that a token covers; None where they are not known.
        counts: visual tokens of each picture.
        questions: that can be answered.
    """

    merged: Tensor
    facts: Tensor | None
    counts: Sequence[int]
    questions: Sequence[Question]


@dataclass(frozen=True)
class Crowd:
    """A crowded tile, of which entries are taken one by one.

    Attributes:
        merged, facts: as of :class:`Seen`, of all 256 tokens.
        entries: question and tokens of each.
        blank: tokens without any entry.
    """

    merged: Tensor
    facts: Tensor
    entries: Sequence[tuple[Question, frozenset[int]]]
    blank: Sequence[int]


def facts_of(labels: Labels, ratio: int) -> Tensor:
    """What each of a tile's visual tokens of ``ratio`` by ``ratio`` patches covers, float32 ``[n, FACTS]``."""
    key, place, glyph = (torch.from_numpy(labels[name]) for name in ('key', 'place', 'glyph'))
    keys = F.one_hot(key, 1 + len(KEYS))[..., 1:]
    digit = place > 1
    number = ((place - 2).clamp(min=0) * len(DIGITS) + (glyph - 1).clamp(0, len(DIGITS) - 1)) * digit
    digits = F.one_hot(number, CODE * len(DIGITS)) * digit[..., None]
    patches = torch.cat([keys, digits], -1).float()
    side = GRID // ratio
    return patches.view(side, ratio, side, ratio, FACTS).amax((1, 3)).flatten(0, 1)


class Material:
    """Draws what one process learns from.

    Args:
        tower: its ViT is used, and left as it is.
        seed: of all draws.
        ratio: patches along a side of a visual token: 2 for full tiles, 4 for compressed ones.
        split: which codes are printed.
    """

    def __init__(self, tower: VisionTower, seed: int, ratio: int = FULL, split: Split = Split.TRAIN) -> None:
        self._tower, self._ratio, self._split = tower, ratio, split
        self.rng = np.random.default_rng(seed)

    @torch.no_grad()
    def look(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """See tiles: ``[B, n, ratio^2 * D]``."""
        return merge(self._tower.patches(torch.from_numpy(np.stack(pixels))), self._ratio)

    def tiles(self, kinds: Sequence[str]) -> list[Seen]:
        """Pictures of one tile, of these kinds."""
        drawn = [self._tile(kind) for kind in kinds]
        merged = self.look([with_noise(self.rng, tile.pixels) for tile in drawn])
        return [
            Seen(rows, facts_of(tile.labels, self._ratio), [len(rows)], tile.questions)
            for rows, tile in zip(merged, drawn, strict=True)
        ]

    def _tile(self, kind: str) -> Tile:
        keys = [str(key) for key in self.rng.permutation(list(KEYS))]
        return make_tile(self.rng, kind, keys[: int(self.rng.integers(1, len(KEYS) + 1))], self._split)

    def page(self, kinds: Sequence[str]) -> Seen:
        """A picture of several tiles, cut as a server cuts it, with its thumbnail."""
        page = make_page(self.rng, kinds, self._split)
        merged = self.look([*cut_tiles(Image.fromarray(page.pixels), 1, 12, True)])
        return Seen(merged.flatten(0, 1), None, [merged.shape[:2].numel()], page.questions)

    def pictures(self, kinds: Sequence[str]) -> Seen:
        """Several pictures of one tile each; what is asked has one answer among them."""
        page = make_page(self.rng, kinds, self._split)
        merged = self.look([page.part(number) for number in range(len(kinds))])
        return Seen(merged.flatten(0, 1), None, [merged.shape[1]] * len(kinds), page.questions)

    def crowd(self, kind: str) -> Crowd:
        """A crowded tile, full."""
        tile = crowded_tile(self.rng, PRINTS[kind])
        [merged] = self.look([with_noise(self.rng, tile.pixels)])
        entries = [
            (Question(entry.question, entry.code, kind), _tokens(entry.rows, entry.columns)) for entry in tile.entries
        ]
        covered = frozenset().union(*(tokens for _, tokens in entries))
        return Crowd(merged, facts_of(tile.labels, FULL), entries, sorted(set(range(len(merged))) - covered))

    def excerpt(self, crowd: Crowd, most: int, length: int) -> Seen:
        """Some entries of a crowded tile, with blank tokens between them, as if they were a tile of fewer tokens.

        Args:
            crowd: the tile.
            most: entries at most, each with another key.
            length: tokens.
        """
        wanted = int(self.rng.integers(1, most + 1))
        chosen: list[Question] = []
        tokens: frozenset[int] = frozenset()
        for number in self.rng.permutation(len(crowd.entries)):
            question, covered = crowd.entries[number]
            known = any(question.text == other.text for other in chosen)
            if not known and len(chosen) < wanted and len(tokens | covered) <= length:
                chosen.append(question)
                tokens |= covered
        missing = length - len(tokens)
        blanks = self.rng.choice(crowd.blank, missing, replace=missing > len(crowd.blank))
        rows = torch.tensor(sorted([*tokens, *blanks.tolist()]))
        return Seen(crowd.merged[rows], crowd.facts[rows], [length], chosen)


def _tokens(rows: slice, columns: slice) -> frozenset[int]:
    """The visual tokens that a rectangle of patches lies in."""
    return frozenset(
        row // FULL * (GRID // FULL) + column // FULL
        for row in range(rows.start, rows.stop)
        for column in range(columns.start, columns.stop)
    )
