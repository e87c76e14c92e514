"""What a language model takes of the memory of each GPU, and what LMDeploy makes its KV cache of, by its own formulas.

This module loads neither torch nor LMDeploy. What a rank needs besides weights is a guess: no GPU has confirmed it yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lmdeploy_vico.host_memory import GIB

CUDA_CONTEXT = GIB // 2  # bytes that a process takes on every device it uses; an estimate
RANK_OVERHEAD = GIB  # bytes of a rank's CUDA context, NCCL buffers and workspaces; an estimate
FEW_BLOCKS = 16  # with fewer KV blocks LMDeploy halves the prefill budget
TOO_FEW_BLOCKS = 2  # with this many or fewer it does not start


class Split(Protocol):
    """Over how many ranks LMDeploy splits attention, MLP and experts; its ``DistConfig`` is one."""

    @property
    def attn_tp(self) -> int:
        """Ranks that share the attention."""

    @property
    def mlp_tp(self) -> int:
        """Ranks that share a dense MLP."""

    @property
    def moe_tp(self) -> int:
        """Ranks that share each expert."""

    @property
    def ep(self) -> int:
        """Groups of ranks among which the experts are dealt."""


@dataclass(frozen=True)
class CacheSizing:
    """The numbers from which LMDeploy computes a rank's KV cache.

    Attributes:
        weights: bytes of the language model on a rank.
        vocab_size: width of the logits, for which LMDeploy reserves memory.
        max_batches: sequences in a batch. With ``max_prefill_tokens`` it gives the rows of the logits.
        max_prefill_tokens: tokens in a prefill.
        share: the share of the remaining memory that becomes KV cache, ``cache_max_entry_count``.
        block: bytes of a KV block.
    """

    weights: int
    vocab_size: int
    max_batches: int
    max_prefill_tokens: int
    share: float
    block: int

    def kv_bytes(self, free: int) -> int:
        """Return the bytes of a rank's KV cache; 0 if the engine cannot start.

        The formula is that of ``ExecutorBase._get_runtime_size`` and ``_update_num_gpu_blocks`` in LMDeploy 0.18.

        Args:
            free: bytes that are free on the device before the engine starts.
        """
        left, tokens = free - self.weights - RANK_OVERHEAD, self.max_prefill_tokens
        while tokens > 0:
            runtime = (tokens + self.max_batches * 2) * self.vocab_size * 2
            blocks = int((left - runtime) * self.share) // self.block
            if blocks <= TOO_FEW_BLOCKS:
                break
            if blocks >= FEW_BLOCKS:
                return blocks * self.block
            tokens //= 2
        return 0


def rank_bytes(sizes: Mapping[str, int], split: Split, kv_heads: int) -> int:
    """Return the bytes of the language model on one rank.

    Every rank has the whole embeddings, head, norms and experts' gates. Where there are fewer key-value heads than
    ranks, several ranks have the same heads.

    Args:
        sizes: bytes of each tensor, by name.
        split: how LMDeploy splits the model.
        kv_heads: of the model.
    """
    return sum(-(-size // _ranks(name, split, kv_heads)) for name, size in sizes.items())


def _ranks(name: str, split: Split, kv_heads: int) -> int:
    """Return over how many ranks LMDeploy's Qwen3 models split a tensor."""
    if '.mlp.experts.' in name:
        return split.ep * split.moe_tp
    if '.k_proj.' in name or '.v_proj.' in name:
        return min(split.attn_tp, kv_heads)
    if '.self_attn.' in name and '_norm.' not in name:
        return split.attn_tp
    if '.mlp.' in name and '.mlp.gate.' not in name:
        return split.mlp_tp
    return 1
