"""The second lesson: language model and ``mlp1`` learn to answer from what the frozen ViT sees; then ``mlp2`` alone."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from lmdeploy_vico.reader.lessons.material import FACTS, Crowd, Material, Seen
from lmdeploy_vico.reader.lessons.optimizers import Optimizers, Rates, Schedule
from lmdeploy_vico.reader.lessons.progress import Progress
from lmdeploy_vico.reader.lessons.talk import Talks, answer
from lmdeploy_vico.training.model.vico_model import VicoModel

# Excerpts of crowded tiles: what is asked for stands among few tokens, so that looking for it is learnt in minutes.
EXCERPTS = 24  # of a step
LENGTHS = {'fine': (32, 48, 96), 'medium': (64, 96, 128)}  # tokens of an excerpt
MOST = 6  # entries of an excerpt
CROWDS, RENEWED = 40, 4  # that are kept of each kind; steps after which one of each is new
TILES, NEW_TILES, KEPT_TILES = 10, 5, 150  # whole tiles of a step; of these, new ones; that are kept
AGAIN = 4  # every so many steps, whole tiles make room for excerpts
KINDS = {'fine': 0.42, 'medium': 0.34, 'shape': 0.14, 'photo': 0.1}
PAGE_KINDS = {'fine': 0.32, 'medium': 0.26, 'shape': 0.22, 'photo': 0.2}
PAGES, KEPT_PAGES = 3, 60
PAGE_SIZES = (3, 2, 5, 4)
ALIGNMENT = 0.5  # weight of the loss of facts, through a head that is thrown away
ABSENT = 3.0  # what facts weigh that are not there, all together, to those that are
RATES = Rates(0.006, 2e-3, {}, (0.9, 0.98))
PROJECTOR_RATES = Rates(0.02, 2e-3, {}, (0.9, 0.98))
PAGE_RATES = Rates(0.005, 5e-4, {}, (0.9, 0.98))


@dataclass(frozen=True)
class Plan:
    """How many steps: of excerpts, of whole tiles, of pages."""

    excerpts: int
    tiles: int
    pages: int


class Answering:
    """Teaches a projector and the language model, or the projector alone.

    Args:
        model: with a ViT that sees; trained in place.
        projector: ``mlp1`` or ``mlp2`` of the model.
        talks: lays out conversations.
        material: of this process, and for this projector.
        console: for progress.
    """

    def __init__(
        self, model: VicoModel, projector: nn.Sequential, talks: Talks, material: Material, console: Console
    ) -> None:
        self._model, self._projector, self._talks = model, projector, talks
        self._material, self._console = material, console
        self._facts = nn.Linear(model.language_model.config.hidden_size, FACTS)
        self._crowds: dict[str, deque[Crowd]] = {kind: deque(maxlen=CROWDS) for kind in LENGTHS}
        self._tiles: deque[Seen] = deque(maxlen=KEPT_TILES)
        self._pages: deque[Seen] = deque(maxlen=KEPT_PAGES)

    def teach(self, plan: Plan) -> None:
        """Teach projector and language model: excerpts, then whole tiles, then pages."""
        steps = plan.excerpts + plan.tiles
        everything = [self._projector, self._model.language_model, self._facts]
        self._run('answering', everything, steps, RATES, 0.6, lambda step: self._tile_step(step, plan.excerpts))
        self._run('pages', everything, plan.pages, PAGE_RATES, 0.4, self._page_step)

    def teach_projector(self, steps: int) -> None:
        """Teach the projector alone, on whole tiles."""
        trained = [self._projector, self._facts]
        self._run('compressing', trained, steps, PROJECTOR_RATES, 0.5, self._whole_tiles)

    def _run(
        self,
        name: str,
        trained: Sequence[nn.Module],
        steps: int,
        rates: Rates,
        falls: float,
        draw: Callable[[int], tuple[str, list[Seen]]],
    ) -> None:
        parameters = [(key, value) for module in trained for key, value in module.named_parameters()]
        matrices = [id(value) for module in trained for value in _matrices(module)]
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        optimizers = Optimizers(parameters, lambda value: id(value) in matrices, rates, Schedule(steps, 40, falls))
        progress = Progress(name, steps, 100, self._console)
        for step in range(steps):
            label, seen = draw(step)
            visual = self._projector(torch.cat([each.merged for each in seen]))
            answers = answer(self._model, [self._talks.make(each.counts, each.questions) for each in seen], visual)
            loss = answers.loss()
            progress.note(f'{label}/loss', loss.item())
            progress.note(f'{label}/right', answers.right().float().mean().item())
            facts = [each.facts for each in seen if each.facts is not None]
            if len(facts) == len(seen):
                loss = loss + ALIGNMENT * self._alignment(visual, torch.cat(facts))
            optimizers.step(step, loss)
            progress.step(step)

    def _alignment(self, visual: Tensor, facts: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(self._facts(visual), facts, reduction='none')
        there = facts > 0
        return each[there].mean() + ABSENT * each[~there].mean()

    def _tile_step(self, step: int, excerpts: int) -> tuple[str, list[Seen]]:
        if step < excerpts or step % AGAIN == AGAIN - 1:
            kind = ('fine', 'medium')[step // 3 % 2]
            return kind, self._excerpts(kind, step)
        return self._whole_tiles(step)

    def _whole_tiles(self, step: int) -> tuple[str, list[Seen]]:
        count = NEW_TILES if self._tiles else 6 * NEW_TILES
        self._tiles.extend(self._material.tiles(self._draw(KINDS, count)))
        return 'tiles', self._choose(self._tiles, TILES)

    def _excerpts(self, kind: str, step: int) -> list[Seen]:
        crowds, material = self._crowds[kind], self._material
        count = 20 if not crowds else 2 if step % RENEWED < 2 else 0
        crowds.extend(material.crowd(kind) for _ in range(count))
        length = int(material.rng.choice(LENGTHS[kind]))
        return [material.excerpt(crowd, MOST, length) for crowd in self._choose(crowds, EXCERPTS)]

    def _page_step(self, step: int) -> tuple[str, list[Seen]]:
        size = PAGE_SIZES[step % len(PAGE_SIZES)]
        for _ in range(1 if self._pages else 12):
            kinds = self._draw(PAGE_KINDS, size)
            make = self._material.pictures if step % 5 == 4 else self._material.page
            self._pages.append(make(kinds))
        tiles = self._material.tiles(self._draw(KINDS, 1))
        return 'pages', [*self._choose(self._pages, PAGES), *tiles]

    def _draw(self, kinds: dict[str, float], count: int) -> list[str]:
        return [str(kind) for kind in self._material.rng.choice(list(kinds), count, p=list(kinds.values()))]

    def _choose(self, kept: Sequence, count: int) -> list:
        return [kept[index] for index in self._material.rng.integers(0, len(kept), count)]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of layers: not embeddings, not what reads the result off."""
    return [
        value
        for name, value in module.named_parameters()
        if value.dim() == 2 and not name.endswith(('embed_tokens.weight', 'lm_head.weight')) and '.' in name
    ]


@torch.no_grad()
def accuracy(
    model: VicoModel, projector: nn.Sequential, talks: Talks, seen: Sequence[Seen], at_once: int = 8
) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind, each question asked alone, as it would be served."""
    found: dict[str, tuple[int, int]] = {}
    for each in seen:
        visual = projector(each.merged)
        for start in range(0, len(each.questions), at_once):
            asked = each.questions[start : start + at_once]
            made = [talks.make(each.counts, [question]) for question in asked]
            right = answer(model, made, visual.repeat(len(asked), 1)).right()
            for question, good in zip(asked, right.tolist(), strict=True):
                hits, count = found.get(question.kind, (0, 0))
                found[question.kind] = hits + good, count + 1
    return found
