"""``logit_bias``: what a client adds to the logits of tokens, in a form that can be sent to the engine process."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.wording import shown

LARGEST = 100.0  # as in OpenAI's API: at this value a token is as good as forced, or banned
MOST = 1024  # tokens of a request


@dataclass(frozen=True)
class LogitBias:
    """Adds to the logits of some tokens; a logits processor of LMDeploy's.

    Attributes:
        token_ids: without repetitions.
        values: one for each token.
    """

    token_ids: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def parse(cls, logit_bias: Mapping[Any, Any]) -> 'LogitBias':
        """Read the parameter of OpenAI's API; values beyond -100 and 100 are taken for these.

        Args:
            logit_bias: from token ids, or texts of them, to numbers.

        Raises:
            ParameterError: it has another form, or too many tokens.
        """
        if len(logit_bias) > MOST:
            raise ParameterError(f'logit_bias must have at most {MOST} tokens, not {len(logit_bias)}.')
        biases = {_token_id(token_id): _number(value) for token_id, value in logit_bias.items()}
        return cls(tuple(biases), tuple(biases.values()))

    def __call__(self, token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[vocabulary]`` of a sequence with the bias added; its tokens do not matter."""
        del token_ids
        index = torch.tensor(self.token_ids, dtype=torch.int64, device=logits.device)
        return logits.index_add(0, index, torch.tensor(self.values, dtype=logits.dtype, device=logits.device))


def _token_id(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ParameterError(f'The keys of logit_bias must be token ids, not {shown(value)}.') from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ParameterError(f'The values of logit_bias must be numbers from -100 to 100, not {shown(value)}.')
    return float(max(-LARGEST, min(LARGEST, value)))
