"""Eq. 1 of the paper: how far the policy's distributions of response tokens are from the reference's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits are kept at a time: in float32 a vocabulary of 152K takes 0.6 GB for so many


@dataclass(frozen=True)
class Target:
    """What the reference says.

    Attributes:
        hidden: its hidden states ``[N, H]`` at the positions that predict the responses' tokens.
        head: its output projection ``[V, H]``.
    """

    hidden: torch.Tensor
    head: torch.Tensor


def token_kl(hidden: torch.Tensor, head: torch.Tensor, target: Target) -> torch.Tensor:
    """KL(reference || policy) of each token's distribution, float32 ``[N]``.

    Logits are formed for :data:`CHUNK` tokens at a time, and again for the gradient, since all of a long response's
    would not fit.

    Args:
        hidden: the policy's hidden states ``[N, H]``.
        head: the policy's output projection ``[V, H]``.
        target: the reference's.
    """
    parts = zip(hidden.split(CHUNK), target.hidden.split(CHUNK), strict=True)
    return torch.cat(
        [checkpoint(_chunk_kl, own, head, theirs, target.head, use_reentrant=False) for own, theirs in parts]
    )


def _chunk_kl(own: torch.Tensor, head: torch.Tensor, theirs: torch.Tensor, their_head: torch.Tensor) -> torch.Tensor:
    policy = F.linear(own, head).float().log_softmax(-1)
    reference = F.linear(theirs, their_head).float().log_softmax(-1)
    return F.kl_div(policy, reference, log_target=True, reduction='none').sum(-1)


def sample_means(tokens: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """The mean over each sample's response tokens: the 1/N of Eq. 1.

    Args:
        tokens: ``[N]``, of one sample after another.
        responses: int64 ``[B]``, how many belong to each.
    """
    return torch.stack([part.mean() for part in tokens.split(responses.tolist())])
