"""How much is measured: kinds of prompts, and how many of each come at once. It loads neither torch nor LMDeploy."""

from collections.abc import Sequence

from lmdeploy_vico.planning.constants import MAX_PREFILL_TOKENS
from lmdeploy_vico.planning.deployment import Workload

TEXTS = (64, 512)
ROUNDS = 12  # turns of each kind that count; one more comes first, to warm up
STEPS = 4  # prefill steps that the prompts of a turn fill
ALONE = 3  # prompts of a turn that come one at a time


def kinds(tiles: int, texts: Sequence[int], compressions: Sequence[float]) -> list[Workload]:
    """Return the kinds of prompts: for every amount of text one without compression, and then the others."""
    shares = sorted({0.0, *compressions})
    return [Workload(tiles, text, share, images=False) for text in texts for share in shares]


def filling(work: Workload, steps: int) -> int:
    """Return how many prompts fill so many prefill steps."""
    return steps * max(1, int(MAX_PREFILL_TOKENS // work.tokens))
