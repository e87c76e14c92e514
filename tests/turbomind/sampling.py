"""The tokens that TurboMind keeps of a distribution, and what it says of them: the steps of ``sampling.cc``.

Its log probabilities are those of the kept tokens: after temperature, ``top_k``, ``top_p`` and ``min_p``.
"""

from typing import Any, NamedTuple

import torch

MOST_TOP_K = 1024
COLUMNS = 1024  # of log probabilities


class DomainError(Exception):
    """``std::domain_error`` of the launcher of the top-k kernel, which nothing catches."""


class Kept(NamedTuple):
    """The kept tokens, the most probable first, with their probabilities, whose sum is 1."""

    probabilities: torch.Tensor
    ids: torch.Tensor


def keep(logits: torch.Tensor, config: Any) -> Kept:
    """Filter the tokens of a step.

    Args:
        logits: ``[V]``, with tokens that must not come at -inf.
        config: the binding's GenerationConfig.

    Raises:
        DomainError: ``top_k`` is more than the kernel takes.
    """
    if not 0 <= config.top_k <= MOST_TOP_K:
        raise DomainError('top-k kernel supports 1<=k<=1024')
    assert config.temperature > 0
    values, ids = (logits / config.temperature).sort(descending=True, stable=True)
    probabilities = values[: config.top_k or None].softmax(-1)
    if config.top_p != 1:
        probabilities = _normalised(probabilities[: 1 + int((probabilities.cumsum(-1) <= config.top_p).sum())])
    if config.min_p != 0:
        probabilities = _normalised(probabilities[probabilities >= probabilities[0] * config.min_p])
    return Kept(probabilities, ids[: len(probabilities)])


def _normalised(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum()


def log_probabilities(kept: Kept, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probabilities and ids of the first kept tokens; the last is the chosen one if it is not there.

    Args:
        kept: of :func:`keep`.
        chosen: the place of the generated token in it.
    """
    places = torch.arange(min(len(kept.ids), COLUMNS))
    if chosen >= COLUMNS:
        places[-1] = chosen
    return kept.probabilities[places].log(), kept.ids[places]
