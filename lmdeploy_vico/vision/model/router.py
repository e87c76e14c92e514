"""ViR, the visual resolution router: attention pooling over a tile's patch tokens, then a gate of four MLP blocks.

With one query per tile the key and value projections can be moved to the query's side, so that neither K nor V of the
1024 patch tokens is formed: for head h, ``q_h . (Wk_h x_t + bk_h) = (Wk_h^T q_h) . x_t + const``, where the constant
cancels in the softmax, and ``sum_t a_t (Wv_h x_t + bv_h) = Wv_h (sum_t a_t x_t) + bv_h`` since the weights sum to one.

Activations are float32 throughout, whatever the weights' type, since a tile has but one row of them: in bfloat16 their
rounding alone flips decisions between tiles of similar scores.

Gradients flow through all of it. ``freeze()``, which serving calls, computes once what depends on the weights alone;
from then on there are none.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lmdeploy_vico.config import ROUTER_HEADS as HEADS
from lmdeploy_vico.kernels.attention_pool import attention_pool
from lmdeploy_vico.kernels.linear import linear

EPS = 1e-5


class AbsorbedAttention(nn.Module):
    """The parameters of an ``nn.MultiheadAttention``, applied to one query per tile with K = V = x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.head_dim = width // HEADS
        self._out_bias: torch.Tensor | None  # of frozen weights
        self.register_buffer('_out_bias', None, persistent=False)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep :meth:`out_bias` from now on; the weights must not change any more."""
        self.requires_grad_(False)
        self._out_bias = None
        self._out_bias = self.out_bias()

    def out_bias(self) -> torch.Tensor:
        """The value projection's bias, carried through the output projection: float32 ``[D]``."""
        if self._out_bias is not None:
            return self._out_bias
        _, _, b_value = self.in_proj_bias.chunk(3)
        return F.linear(b_value.float(), self.out_proj.weight.float(), self.out_proj.bias.float())

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
        return linear(values.transpose(0, 1).flatten(1), self.out_proj.weight, self.out_bias())


class AttentionPooling(nn.Module):
    """Four rounds of ``o = LN(MHA(q=o, k=x, v=x))`` from one learned query.

    Parameter names are those of the checkpoint below ``pooling_before_gating.``
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        self.attn1, self.norm1 = AbsorbedAttention(width), nn.LayerNorm(width, eps=EPS)
        self.attn2, self.norm2 = AbsorbedAttention(width), nn.LayerNorm(width, eps=EPS)
        self._first_query: torch.Tensor | None  # of frozen weights
        self.register_buffer('_first_query', None, persistent=False)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep :meth:`first_query` from now on, and the norms in float32; the weights must not change any more."""
        self.requires_grad_(False)
        self.attn1.freeze()
        self.attn2.freeze()
        self.norm1.float()
        self.norm2.float()
        self._first_query = None
        self._first_query = self.first_query()

    def first_query(self) -> torch.Tensor:
        """The absorbed query of the first round, the same for every tile: float32 ``[1, 16, D]``."""
        if self._first_query is not None:
            return self._first_query
        return self.attn1.absorb(self.query_token.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool patch tokens ``[B, T, D]`` to float32 ``[B, D]``.

        Raises:
            RuntimeError: a weight's gradient is needed after :meth:`freeze`.
        """
        frozen = self._first_query is not None
        if frozen and torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters()):
            raise RuntimeError('The router has been frozen and has no gradients: load it again to train it.')
        pooled = _norm(self.norm1, self.attn1(x, self.first_query()))
        # The weights of the second round serve the third and fourth too: the checkpoints were trained so, and carry
        # attn3, attn4, norm3 and norm4 unused.
        for _ in range(3):
            pooled = _norm(self.norm2, self.attn2(x, self.attn2.absorb(pooled)))
        return pooled


class Gating(nn.Module):
    """Four residual MLP blocks and a two-way classifier (paper, Eq. 4). Names as below ``gating.``"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = _gate_block(width), _gate_block(width)
        self.block3, self.block4 = _gate_block(width), _gate_block(width)
        self.gate = nn.Sequential(nn.LayerNorm(width, eps=EPS), nn.Linear(width, 2))

    def freeze(self) -> None:
        """Keep the norms in float32 from now on."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Classify float32 ``[B, D]``; returns the probabilities ``[B, 2]``, p[:, 0] meaning "compress"."""
        return torch.softmax(self.logits(pooled), dim=-1)

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """The same before the softmax."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            up, _, _, down, _, norm = block
            pooled = pooled + _norm(norm, _apply(down, _apply(up, pooled, gelu=True)))
        norm, classifier = self.gate
        return _apply(classifier, _norm(norm, pooled))


def _apply(layer: nn.Module, rows: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    assert isinstance(layer, nn.Linear)
    return linear(rows, layer.weight, layer.bias, gelu)


def _norm(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A LayerNorm of float32 rows, whatever the type of its weights."""
    assert isinstance(layer, nn.LayerNorm)
    return F.layer_norm(rows, layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps)


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
