"""The language model: its shapes, and the seconds of a prefill step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

from lmdeploy_vico.checkpoints.flops import causal_attention_flops
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL, Shape
from lmdeploy_vico.checkpoints.random.configuration import published_config
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.checkpoints.sizes import MODELS, Size
from lmdeploy_vico.planning import PlanningError, constants
from lmdeploy_vico.planning.constants import FITTED, Fitted
from lmdeploy_vico.planning.gpus import Gpu

BYTES = 2  # of a value in bfloat16
LAYERS = f'{LANGUAGE_MODEL}model.layers.'
EXPERTS = '.mlp.experts.'


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` of one prompt; ``last`` if its first token comes with them."""

    start: float
    end: float
    last: bool


def pieces(tokens: float, limit: float) -> Iterator[Piece]:
    """Cut a prompt into chunks of at most ``limit`` tokens, as LMDeploy does."""
    start = 0.0
    while tokens - start > limit:
        yield Piece(start, start + limit, last=False)
        start += limit
    yield Piece(start, tokens, last=True)


def model_of(name: str) -> str:
    """Return the published model of this name, in capitals or not, with or without "-A3B"; raises PlanningError."""
    found = [model for model in MODELS if name.upper() in (model, model.partition('-')[0])]
    if not found:
        raise PlanningError(f'--model {name} is not known: it takes {", ".join(MODELS)}.')
    return found[0]


@cache
def shapes_of(model: str) -> dict[str, Shape]:
    """Return name and shape of every tensor of a published model."""
    return checkpoint_shapes(published_config(MODELS[model], dict.fromkeys(SPECIAL_TOKENS, 0)))


@cache
def active_weights(model: str) -> int:
    """Return the weights of the layers that one token meets."""
    size = MODELS[model].size
    layers = {name: prod(shape) for name, shape in shapes_of(model).items() if name.startswith(LAYERS)}
    experts = sum(count for name, count in layers.items() if EXPERTS in name)
    return sum(layers.values()) - (experts - experts * size.experts_per_token // size.experts if experts else 0)


@cache
def stored_weights(model: str) -> int:
    """Return the weights of the layers and the head, which every step reads."""
    names = (LAYERS, f'{LANGUAGE_MODEL}lm_head')
    return sum(prod(shape) for name, shape in shapes_of(model).items() if name.startswith(names))


def all_reduce_seconds(size: Size, gpu: Gpu, tp: int, tokens: float) -> float:
    """Return the seconds of the all-reduces of a step of so many tokens over ``tp`` GPUs: two in each layer."""
    if tp == 1:
        return 0.0
    moved = 2 * (tp - 1) / tp * tokens * size.hidden * BYTES  # bytes that each GPU sends
    once = constants.ALL_REDUCE_LATENCY + moved / (constants.ALL_REDUCE * gpu.nvlink)
    return 2 * size.layers * once


@dataclass(frozen=True)
class LanguageModel:
    """A language model on the GPUs of one server.

    Attributes:
        model: one of :data:`~lmdeploy_vico.checkpoints.sizes.MODELS`.
        gpu: of which kind.
        tp: over how many of them it is split.
        fitted: see there.
    """

    model: str
    gpu: Gpu
    tp: int
    fitted: Fitted = FITTED

    @property
    def size(self) -> Size:
        """Its dimensions."""
        return MODELS[self.model].size

    def step_seconds(self, step: Sequence[Piece]) -> float:
        """Return the seconds of one prefill step: GPUs, all-reduces, and what the GPUs wait for each prompt."""
        tokens = sum(piece.end - piece.start for piece in step)
        prompts = sum(piece.last for piece in step)
        gpu = max(self.compute_seconds(step), self.read_seconds())
        return gpu + self.all_reduce_seconds(tokens) + prompts * self.fitted.seconds(self.model)

    def compute_seconds(self, step: Sequence[Piece]) -> float:
        """Return the seconds of the FLOP of a step."""
        size, width = self.size, self.size.heads * self.size.head_dim
        tokens = sum(piece.end - piece.start for piece in step)
        prompts = sum(piece.last for piece in step)
        products = 2 * active_weights(self.model) * tokens + 2 * size.hidden * MODELS[self.model].vocab_size * prompts
        attention = sum(
            causal_attention_flops(end, width, size.layers) - causal_attention_flops(start, width, size.layers)
            for start, end, _ in step
        )
        return (products / constants.PRODUCTS + attention / constants.ATTENTION) / (self.gpu.flops * self.tp)

    def read_seconds(self) -> float:
        """Return the seconds in which each GPU reads its weights: no step is shorter. Experts are read all."""
        return BYTES * stored_weights(self.model) / self.tp / (constants.BANDWIDTH * self.gpu.bandwidth)

    def all_reduce_seconds(self, tokens: float) -> float:
        """Return the seconds of a step's all-reduces, which overlap with nothing."""
        return all_reduce_seconds(self.size, self.gpu, self.tp, tokens)

    def request_seconds(
        self, tokens: float, limit: float = constants.MAX_PREFILL_TOKENS, most: float = math.inf
    ) -> float:
        """Return the seconds of a prompt where the queue never empties: its part of a step that is as full as can be.

        Args:
            tokens: of each prompt.
            limit: tokens of a step, ``max_prefill_token_num``.
            most: prompts of a step, on average, for other reasons; at least 1.
        """
        chunks = list(pieces(tokens, limit))
        if len(chunks) > 1:
            return sum(self.step_seconds([chunk]) for chunk in chunks)
        together = min(limit // tokens, most)
        fewer = int(together)  # an average of 1.6 is 1 prompt in some steps and 2 in others
        share = together - fewer
        smaller, larger = (self.step_seconds(chunks * count) for count in (fewer, fewer + 1))
        return ((1 - share) * smaller + share * larger) / together
