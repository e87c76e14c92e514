"""The first lesson: the ViT learns to say of every patch what it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from lmdeploy_vico.choices import NO_SPEEDUPS
from lmdeploy_vico.config import GRID
from lmdeploy_vico.reader.documents.codes import CHARACTERS, KEYS, Split
from lmdeploy_vico.reader.documents.page import PRINTS, make_tile
from lmdeploy_vico.reader.documents.pictures import COLOURS, PHOTOGRAPHS, SHAPES
from lmdeploy_vico.reader.documents.print import Print, printed_tile
from lmdeploy_vico.reader.documents.tile import Tile, with_noise
from lmdeploy_vico.reader.lessons.optimizers import Optimizers, Rates, Schedule
from lmdeploy_vico.reader.lessons.progress import Progress
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel

CLASSES = {
    'glyph': 1 + len(CHARACTERS), 'key': 1 + len(KEYS), 'place': 6, 'shape': 1 + len(SHAPES),
    'colour': 1 + len(COLOURS), 'photo': 1 + len(PHOTOGRAPHS),
}  # fmt: skip
WEIGHTS = {'glyph': 1.0, 'key': 1.0, 'place': 1.0, 'shape': 0.5, 'colour': 0.3, 'photo': 0.3}
EARLY, EARLY_WEIGHT = 2, 0.5  # characters shall be known after so many layers, so that the others can put them together
BLANK = 0.3  # what patches weigh that show nothing of a kind, of which there are many
KINDS = {'fine': 0.55, 'medium': 0.27, 'shape': 0.09, 'photo': 0.09}
WHOLE_KINDS = {'fine': 0.35, 'medium': 0.25, 'shape': 0.28, 'photo': 0.12}  # a shape is larger than a band
DENSE = 0.7  # of printed tiles are as full as can be
CROWD = {14: 60, 28: 14}  # entries of these, by their pitch
BAND = 8  # rows of patches that the ViT sees at a time at first: its attention is learnt sooner, and costs less
# A high rate of the patch embedding drowns the positions.
RATES = Rates(0.006, 3e-3, {'patch_embedding.weight': 1e-4, 'position_embedding': 3e-4}, (0.9, 0.95))


@dataclass(frozen=True)
class Plan:
    """How long: ``banded`` steps on bands of tiles, then ``whole`` ones on whole tiles."""

    banded: int
    whole: int


class Seeing(nn.Module):
    """The ViT with a linear classifier of every patch for each thing that may be asked; these are thrown away.

    Args:
        vision: is trained.
    """

    def __init__(self, vision: InternVisionModel) -> None:
        super().__init__()
        self.vision = vision
        width = vision.embeddings.class_embedding.shape[-1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})
        self.early = nn.Linear(width, CLASSES['glyph'])
        self.norm, self.early_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tiles: Tensor, band: int) -> dict[str, Tensor]:
        """Classify patches.

        Args:
            tiles: uint8 ``[B, 448, 448, 3]``.
            band: rows of patches that are seen together, a divisor of 32.

        Returns:
            Logits ``[B * 1024, classes]`` by name; those of ``early`` after :data:`EARLY` layers.
        """
        embedded = self.vision.embeddings(tiles, False)
        # Bands of one tile stand one after another: [B * bands, 1 + band * 32, D].
        first, patches = embedded[:, :1], embedded[:, 1:].unflatten(1, (GRID // band, -1))
        hidden = torch.cat([first[:, None].expand(-1, GRID // band, -1, -1), patches], 2).flatten(0, 1)
        for number, layer in enumerate(self.vision.encoder.layers, 1):
            hidden = layer(hidden, NO_SPEEDUPS)
            if number == EARLY:
                early = self.early(self.early_norm(hidden[:, 1:])).flatten(0, 1)
        seen = self.norm(hidden[:, 1:]).flatten(0, 1)
        return {name: head(seen) for name, head in self.heads.items()} | {'early': early}


def draw_tile(rng: np.random.Generator, kind: str) -> Tile:
    """Draw a tile of a kind; a printed one is often crowded."""
    keys = [str(key) for key in rng.permutation(list(KEYS))]
    if kind in PRINTS and rng.random() < DENSE:
        return crowded_tile(rng, PRINTS[kind])
    return make_tile(rng, kind, keys, Split.TRAIN)


def crowded_tile(rng: np.random.Generator, size: Print) -> Tile:
    """As many entries as find room anywhere, with a patch between them."""
    keys = [KEYS[number] for number in rng.integers(0, len(KEYS), CROWD[size.pitch])]
    return printed_tile(rng, replace(size, margin=1, listed=False), keys, Split.TRAIN)


def teach_seeing(lesson: Seeing, plan: Plan, seed: int, console: Console) -> None:
    """Train a ViT; every process sees other tiles.

    Args:
        lesson: with an initialised ViT; trained in place.
        plan: how long.
        seed: of this process's draws.
        console: for progress.
    """
    rng = np.random.default_rng(seed)
    steps = plan.banded + plan.whole
    layers = {id(value) for value in lesson.vision.encoder.parameters() if value.dim() == 2}
    optimizers = Optimizers(
        lesson.named_parameters(), lambda value: id(value) in layers, RATES, Schedule(steps, rise=30, falls=0.6)
    )
    progress = Progress('seeing', steps, 50, console)
    for step in range(steps):
        banded = step < plan.banded
        shares = KINDS if banded else WHOLE_KINDS
        kinds = [str(kind) for kind in rng.choice(list(shares), 4 if banded else 2, p=list(shares.values()))]
        if banded:
            kinds[:2] = ['fine', 'medium']
        tiles = [draw_tile(rng, kind) for kind in kinds]
        pixels = torch.from_numpy(np.stack([with_noise(rng, tile.pixels) for tile in tiles]))
        labels = {name: torch.from_numpy(np.stack([tile.labels[name] for tile in tiles])).flatten() for name in CLASSES}
        logits = lesson(pixels, BAND if banded else GRID)
        optimizers.step(step, loss_of(logits, labels))
        for name, share in agreement(logits, labels, kinds).items():
            progress.note(name, share)
        progress.step(step)


def loss_of(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropies of all heads; patches that show something of a kind weigh as much as those that do not."""
    terms = [(WEIGHTS[name], logits[name], labels[name]) for name in CLASSES]
    terms.append((EARLY_WEIGHT, logits['early'], labels['glyph']))
    total = torch.zeros(())
    for weight, scores, wanted in terms:
        each = F.cross_entropy(scores, wanted, reduction='none')
        shows = wanted > 0
        total = total + weight * BLANK * each[~shows].mean()
        if shows.any():
            total = total + weight * each[shows].mean()
    return total


@torch.no_grad()
def agreement(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, float]:
    """The share of patches with the right class, of those that show something, by kind of tile and head."""
    found = {}
    for name in CLASSES:
        right = (logits[name].argmax(1) == labels[name]).view(len(kinds), -1)
        shows = (labels[name] > 0).view(len(kinds), -1)
        for kind in set(kinds):
            chosen = torch.tensor([each == kind for each in kinds])
            if shows[chosen].any():
                found[f'{kind}/{name}'] = right[chosen][shows[chosen]].float().mean().item()
    return found
