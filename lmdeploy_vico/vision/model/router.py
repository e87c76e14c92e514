"""ViR, the visual resolution router: attention pooling over a tile's patch tokens, then a gate of four MLP blocks.

With one query per tile the key and value projections can be moved to the query's side, so that neither K nor V of the
1024 patch tokens is formed: for head h, ``q_h . (Wk_h x_t + bk_h) = (Wk_h^T q_h) . x_t + const``, where the constant
cancels in the softmax, and ``sum_t a_t (Wv_h x_t + bv_h) = Wv_h (sum_t a_t x_t) + bv_h`` since the weights sum to one.

Activations are float32 throughout, whatever the weights' type, since a tile has but one row of them: in bfloat16 their
rounding alone flips decisions between tiles of similar scores.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lmdeploy_vico.kernels.attention_pool import attention_pool
from lmdeploy_vico.kernels.linear import linear

HEADS = 16  # of the pooling, whatever the ViT's width
EPS = 1e-5


class AbsorbedAttention(nn.Module):
    """The parameters of an ``nn.MultiheadAttention``, applied to one query per tile with K = V = x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.head_dim = width // HEADS
        self._out_bias: torch.Tensor | None
        self.register_buffer('_out_bias', None, persistent=False)

    def prepare(self) -> None:
        """Carry the value projection's bias through the output projection; call once the weights are in place."""
        _, _, b_value = self.in_proj_bias.chunk(3)
        self._out_bias = F.linear(b_value.float(), self.out_proj.weight.float(), self.out_proj.bias.float())

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Project the query and carry it through the key projection.

        Args:
            query: float32 ``[B or 1, D]``.

        Returns:
            u float32 ``[B or 1, 16, D]``: ``u_h . x_t / sqrt(D / 16)`` is head h's attention logit up to a constant.
        """
        w_query, w_key, _ = self.in_proj_weight.chunk(3)
        b_query, _, _ = self.in_proj_bias.chunk(3)
        heads = linear(query, w_query, b_query).view(-1, HEADS, self.head_dim).transpose(0, 1)
        return linear(heads, w_key.view(HEADS, self.head_dim, -1).transpose(1, 2)).transpose(0, 1)

    def forward(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Attend with absorbed queries u over x ``[B, T, D]``; returns float32 ``[B, D]``."""
        _, _, w_value = self.in_proj_weight.chunk(3)
        context = attention_pool(x, u, scale=self.head_dim**-0.5)  # [B, 16, D]
        values = linear(context.transpose(0, 1), w_value.view(HEADS, self.head_dim, -1))  # [16, B, D / 16]
        return linear(values.transpose(0, 1).flatten(1), self.out_proj.weight, self._out_bias)


class AttentionPooling(nn.Module):
    """Four rounds of ``o = LN(MHA(q=o, k=x, v=x))`` from one learned query.

    Parameter names are those of the checkpoint below ``pooling_before_gating.``
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        self.attn1, self.norm1 = AbsorbedAttention(width), nn.LayerNorm(width, eps=EPS)
        self.attn2, self.norm2 = AbsorbedAttention(width), nn.LayerNorm(width, eps=EPS)
        self._first_query: torch.Tensor | None
        self.register_buffer('_first_query', None, persistent=False)

    def prepare(self) -> None:
        """Absorb the first step's query, the same for every tile; call once the weights are in place."""
        self.attn1.prepare()
        self.attn2.prepare()
        self.norm1.float()
        self.norm2.float()
        self._first_query = self.attn1.absorb(self.query_token.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool patch tokens ``[B, T, D]`` to float32 ``[B, D]``."""
        if self._first_query is None:
            raise RuntimeError('AttentionPooling.prepare() has to run after loading the weights')
        pooled = self.norm1(self.attn1(x, self._first_query))
        # The weights of the second round serve the third and fourth too: the checkpoints were trained so, and carry
        # attn3, attn4, norm3 and norm4 unused.
        for _ in range(3):
            pooled = self.norm2(self.attn2(x, self.attn2.absorb(pooled)))
        return pooled


class Gating(nn.Module):
    """Four residual MLP blocks and a two-way classifier (paper, Eq. 4). Names as below ``gating.``"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = _gate_block(width), _gate_block(width)
        self.block3, self.block4 = _gate_block(width), _gate_block(width)
        self.gate = nn.Sequential(nn.LayerNorm(width, eps=EPS), nn.Linear(width, 2))

    def prepare(self) -> None:
        """Bring the norms to float32; call once the weights are in place."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Classify float32 ``[B, D]``; returns the probabilities ``[B, 2]``, p[:, 0] meaning "compress"."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            up, _, _, down, _, norm = block
            pooled = pooled + norm(_apply(down, _apply(up, pooled, gelu=True)))
        norm, classifier = self.gate
        return torch.softmax(_apply(classifier, norm(pooled)), dim=-1)


def _apply(layer: nn.Module, rows: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    assert isinstance(layer, nn.Linear)
    return linear(rows, layer.weight, layer.bias, gelu)


def _gate_block(width: int) -> nn.Sequential:
    # Identity where training had dropout, so that the indices are the checkpoint's: 0, 3 and 5.
    return nn.Sequential(
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(4 * width, width),
        nn.Identity(),
        nn.LayerNorm(width, eps=EPS),
    )
