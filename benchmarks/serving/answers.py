"""What a server answered to one prompt, and how far two answers to it are apart."""

from dataclasses import dataclass, field
from typing import Any

# Natural-log probabilities by which a token may be behind the best one and still take its place in a batch of another
# size: five steps of a float16 number between 4 and 8, such as the largest logits of a tiny checkpoint are. In float32
# on a CPU there is no such step, and ids are the same.
NEAR_TIE = 0.02


@dataclass(frozen=True)
class Answer:
    """Output ids and prompt tokens: what tells prompts' answers apart.

    Attributes:
        tokens: the output ids' names; empty where log-probabilities were not asked for, as below.
        logprobs: of the likeliest tokens at each position, by name.
    """

    output_ids: tuple[int, ...]
    prompt_tokens: int
    tokens: tuple[str, ...] = field(default=(), compare=False)
    logprobs: tuple[dict[str, float], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, response: dict[str, Any]) -> 'Answer':
        [choice] = response['choices']
        places = (choice.get('logprobs') or {}).get('content') or []
        logprobs = [{one['token']: one['logprob'] for one in (place, *place['top_logprobs'])} for place in places]
        names = tuple(place['token'] for place in places)
        return cls(tuple(choice['output_ids']), response['usage']['prompt_tokens'], names, tuple(logprobs))

    def behind(self, place: int, token: str) -> float:
        """By how much a token is less likely than the likeliest one at a position, of those that are known."""
        known = self.logprobs[place]
        return max(known.values()) - known.get(token, float('-inf'))


def gap(one: Answer, other: Answer) -> float:
    """How far two answers to a prompt are from each other: 0 for the same ids, infinite for what no near tie explains.

    Elsewhere, at the first id that differs, the larger of what each answer's token is behind by the other's
    log-probabilities.
    """
    if one == other:
        return 0.0
    pairs = zip(one.output_ids, other.output_ids, strict=False)
    place = next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    known = min(len(one.logprobs), len(other.logprobs))
    if place is None or place >= known or one.prompt_tokens != other.prompt_tokens:
        return float('inf')
    return max(one.behind(place, other.tokens[place]), other.behind(place, one.tokens[place]))
