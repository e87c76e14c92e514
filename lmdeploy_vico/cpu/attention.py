"""Attention over LMDeploy's paged KV cache and over packed sequences, in float32, one sequence at a time.

Each sequence is attended by itself, and its queries in blocks that lie at fixed positions of the sequence: the shape
of every product follows from a token's position alone. A token's output has the same bits whatever else is in the
batch, and whether the tokens before it came in the same step, in an earlier chunk or from the prefix cache. Plain
matrix products and an explicit softmax: this is the reference that a faster implementation is compared with.
"""

from dataclasses import dataclass

import torch
from lmdeploy.messages import QuantPolicy
from lmdeploy.pytorch.backends.attention import AttentionImpl, AttentionMetadata, PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.flash_attention import FlashAttentionBuildSpec, FlashAttentionImpl

# Queries attended at once, from a position that is a multiple of it. Many make a step of decoding, which has one query
# and computes a whole block, slow; few make a prompt slow.
QUERY_BLOCK = 16


@dataclass
class CpuAttentionMetadata(AttentionMetadata):
    """LMDeploy's metadata of one step, with the sequence lengths on the Python side.

    ``slots`` are the (page, offset) pairs of the step's new tokens, both int64 ``[tokens]``; they are computed once
    and used by every layer.
    """

    q_lens: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()
    slots: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache_slots(self, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return page and offset of every new token, for pages of ``page_size`` tokens."""
        if self.slots is None:
            pages, offsets = [], []
            for table, q_len, kv_len in zip(self.block_offsets.long(), self.q_lens, self.kv_lens, strict=True):
                positions = torch.arange(kv_len - q_len, kv_len)
                pages.append(table[positions // page_size])
                offsets.append(positions % page_size)
            self.slots = torch.cat(pages), torch.cat(offsets)
        return self.slots


def build_metadata(step_context) -> CpuAttentionMetadata:
    """Build the attention metadata of one step from LMDeploy's ``StepContext``."""
    q_seqlens, kv_seqlens = step_context.q_seqlens, step_context.kv_seqlens
    pad = torch.nn.functional.pad
    return CpuAttentionMetadata(
        is_decoding=step_context.is_decoding,
        block_offsets=step_context.block_offsets,
        q_start_loc=step_context.q_start_loc,
        q_seqlens=q_seqlens,
        kv_seqlens=kv_seqlens,
        cu_seqlens_q=pad(q_seqlens.cumsum(0), (1, 0)).int(),
        cu_seqlens_k=pad(kv_seqlens.cumsum(0), (1, 0)).int(),
        quant_policy=step_context.kv_quant_policy,
        q_lens=tuple(q_seqlens.tolist()),
        kv_lens=tuple(kv_seqlens.tolist()),
    )


@dataclass(frozen=True)
class Rule:
    """What a query may attend to and how its scores are shaped.

    ``window`` is how many tokens back a query sees, 0 for all of them; ``soft_cap`` is 0 for none.
    """

    scale: float
    causal: bool
    window: int = 0
    soft_cap: float = 0.0

    @classmethod
    def of(cls, spec: PagedAttentionBuildSpec | FlashAttentionBuildSpec) -> 'Rule':
        """Read the rule from a build spec of LMDeploy, whose kernels use only the left side of a window."""
        window = spec.sliding_window
        left = window if window is None or isinstance(window, int) else window[0]
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        return cls(scale, spec.causal, max(0, left or 0), max(0.0, spec.logit_softcapping or 0.0))

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Positions ``[q]`` and ``[kv]`` to a boolean ``[q, kv]`` of forbidden pairs, or None if none is."""
        distance = queries[:, None] - keys[None, :]
        forbidden = distance < 0 if self.causal else None
        if self.window:
            beyond = distance > self.window
            forbidden = beyond if forbidden is None else forbidden | beyond
        return forbidden


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    sinks: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence: ``softmax(scale * q k^T) v`` in float32, whose queries are the last of its keys.

    Args:
        query: ``[q, heads, dim]``.
        key: ``[kv, kv_heads, dim]``; ``heads`` is a multiple of ``kv_heads``.
        value: ``[kv, kv_heads, v_dim]``.
        rule: what may be attended to.
        sinks: per-head score of a key without a value, ``[heads]``.
        alibi: per-head slope of a bias linear in the distance, ``[heads]``.

    Returns:
        ``[q, heads, v_dim]`` in the query's dtype.
    """
    q_len, heads, _ = query.shape
    kv_len, kv_heads, _ = key.shape
    groups = heads // kv_heads
    first = kv_len - q_len
    before, after = first % QUERY_BLOCK, -kv_len % QUERY_BLOCK  # rows that fill the first and the last block
    queries = _pad_rows(query.float() * rule.scale, before, after).unflatten(1, (kv_heads, groups))
    # Without causality a block's queries see all keys, and none may see a key that fills a block.
    missing = after if rule.causal else 0
    keys = _pad_rows(key.float(), 0, missing).permute(1, 2, 0)  # [kv_heads, dim, kv]
    values = _pad_rows(value.float(), 0, missing).transpose(0, 1)  # [kv_heads, kv, v_dim]
    key_positions = torch.arange(keys.shape[-1])
    outputs = []
    for start, rows in zip(range(first - before, kv_len, QUERY_BLOCK), queries.split(QUERY_BLOCK), strict=True):
        positions = torch.arange(start, start + QUERY_BLOCK)
        seen = start + QUERY_BLOCK if rule.causal else kv_len  # no row of the block may attend to later keys
        scores = rows.permute(1, 2, 0, 3).flatten(1, 2) @ keys[..., :seen]
        scores = scores.unflatten(1, (groups, QUERY_BLOCK))  # [kv_heads, groups, rows, seen]
        if rule.soft_cap:
            scores = torch.tanh(scores / rule.soft_cap) * rule.soft_cap
        if alibi is not None:
            distance = (positions[:, None] - key_positions[None, :seen]).abs()
            scores = scores - alibi.view(kv_heads, groups, 1, 1) * distance
        edge = 0 if rule.window else start  # all rows may attend to the keys before it
        forbidden = rule.mask(positions, key_positions[edge:seen])
        if forbidden is not None:
            scores[..., edge:].masked_fill_(forbidden, float('-inf'))
        attended = _softmax(scores, sinks).flatten(1, 2) @ values[:, :seen]
        outputs.append(attended.unflatten(1, (groups, QUERY_BLOCK)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)[before : before + q_len].to(query.dtype)


def _pad_rows(rows: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """``[rows, heads, dim]`` with zeros before the first row and after the last."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 0, before, after)) if before or after else rows


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension, with one more key without a value per head if there are sinks."""
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]


class CpuPagedAttention(AttentionImpl[CpuAttentionMetadata]):
    """Writes new keys and values to the paged cache and attends to all of them."""

    def __init__(self, spec: PagedAttentionBuildSpec) -> None:
        if spec.use_flash_mla or spec.mla_index_topk is not None:
            raise NotImplementedError('The CPU reference backend has no multi-head latent attention (MLA).')
        if spec.block_sparse_size != 1:
            raise NotImplementedError('The CPU reference backend has no block-sparse attention.')
        super().__init__(
            num_heads=spec.num_heads,
            head_size=spec.head_dim,
            scale=spec.scale,
            num_kv_heads=spec.num_kv_heads,
            v_head_size=spec.v_head_dim,
            alibi=spec.alibi,
            sliding_window=spec.sliding_window,
            logit_softcapping=spec.logit_softcapping,
            causal=spec.causal,
        )
        self.rule = Rule.of(spec)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        attn_metadata: CpuAttentionMetadata,
        k_scales_zeros: torch.Tensor | None = None,
        v_scales_zeros: torch.Tensor | None = None,
        learnable_sink: torch.Tensor | None = None,
        nsa_indices: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """Attend the step's packed tokens.

        Args:
            query: ``[tokens, heads, dim]``, the sequences one after the other.
            key: ``[tokens, kv_heads, dim]`` or None if the cache holds them already.
            value: ``[tokens, kv_heads, v_dim]`` or None.
            k_cache: ``[pages, page_size, kv_heads, dim]``, possibly strided.
            v_cache: ``[pages, page_size, kv_heads, v_dim]``.
            attn_metadata: the step's sequence lengths and page tables.
            k_scales_zeros: unused, the cache is not quantized.
            v_scales_zeros: unused.
            learnable_sink: ``[heads]`` or None.
            nsa_indices: not supported.
            inplace: unused.

        Returns:
            ``[tokens, heads, v_dim]``.
        """
        if attn_metadata.quant_policy != QuantPolicy.NONE or nsa_indices is not None:
            raise NotImplementedError('The CPU reference backend has no quantized or sparse KV cache.')
        page_size = k_cache.size(1)
        if key is not None:
            pages, offsets = attn_metadata.cache_slots(page_size)
            k_cache[pages, offsets] = key.to(k_cache.dtype)
            v_cache[pages, offsets] = value.to(v_cache.dtype)

        query = query.reshape(-1, *query.shape[-2:])
        outputs = []
        rows = query.split(attn_metadata.q_lens)
        for row, table, kv_len in zip(rows, attn_metadata.block_offsets.long(), attn_metadata.kv_lens, strict=True):
            pages = table[: -(-kv_len // page_size)]
            keys = k_cache[pages].flatten(0, 1)[:kv_len]
            values = v_cache[pages].flatten(0, 1)[:kv_len]
            outputs.append(attend(row, keys, values, self.rule, learnable_sink, self.alibi_slopes))
        return torch.cat(outputs)


class CpuFlashAttention(FlashAttentionImpl):
    """Attention over packed sequences without a cache, as LMDeploy's vision towers use it."""

    def __init__(self, spec: FlashAttentionBuildSpec) -> None:
        self.rule = Rule.of(spec)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_start_loc: torch.Tensor,
        q_seqlens: torch.Tensor,
        kv_start_loc: torch.Tensor,
        kv_seqlens: torch.Tensor,
        max_q_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attend ``[tokens, heads, dim]`` queries within their sequences; returns ``[tokens, heads, v_dim]``."""
        shape = query.shape
        query, key, value = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (query, key, value))
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        spans = zip(q_start_loc.tolist(), q_seqlens.tolist(), kv_start_loc.tolist(), kv_seqlens.tolist(), strict=True)
        for q_start, q_len, kv_start, kv_len in spans:
            sequence = slice(kv_start, kv_start + kv_len)
            output[q_start : q_start + q_len] = attend(
                query[q_start : q_start + q_len], key[sequence], value[sequence], self.rule
            )
        return output.reshape(*shape[:-1], value.shape[-1])
