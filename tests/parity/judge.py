"""Judges the answers of a server or a pipeline by the cache-free reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.prompts import chat_segments
from parity.reference import Reference

# An answer's token may differ from the reference's best one by a near tie in bfloat16, no more: in standard deviations
# of the step's logits.
GAP = 0.05
TOKENS = 12


@dataclass(frozen=True)
class Answer:
    """What a server or a pipeline said to one prompt."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int = 0


class Judge:
    """Compares answers with the reference; the same answer to the same prompt is judged once."""

    def __init__(self, checkpoint: Path) -> None:
        self.reference = Reference(checkpoint)
        self._verdicts: dict[Any, tuple[float, int]] = {}

    def check(self, messages: Sequence[dict], answer: Answer, compression: Any = 'auto', name: str = '') -> None:
        """Assert that ``answer`` is right: its tokens and the length of its prompt."""
        assert len(answer.token_ids) >= TOKENS, name
        key = (name, compression, answer.token_ids)
        if not name or key not in self._verdicts:
            judgement = self.reference.judge(chat_segments(messages), answer.token_ids, compression)
            self._verdicts[key] = (judgement.gap, judgement.prompt_tokens)
        gap, prompt_tokens = self._verdicts[key]
        assert answer.prompt_tokens == prompt_tokens, name
        assert gap <= GAP, f'{name}: {gap:.3f} standard deviations from the best token'
