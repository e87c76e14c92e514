"""The language model's operators that LMDeploy has only for accelerators, or sums otherwise.

A token's result has the same bits whatever other tokens are in the batch: linear layers and experts multiply a fixed
number of rows at once, element-wise functions are not split within a row, and what is summed over experts is summed in
a fixed order. A sum over tensor-parallel ranks is in a fixed order too while there are no more than two.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lmdeploy.pytorch.backends.activation import SiluAndMulImpl
from lmdeploy.pytorch.backends.default.linear import DefaultLinearImpl
from lmdeploy.pytorch.backends.lora import AdapterInfo, LoRAImpl
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec, FusedMoEImpl
from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingImpl

from . import gathering

logger = logging.getLogger(__name__)

# A CPU's libraries choose how to sum by a product's shape, so a row's last bits may depend on how many rows there are.
# Every product has one number of rows: the first of these for which a row's bits do not depend on where it stands.
ROWS = (32, 8, 1)
# Elements below which torch runs an element-wise operation on one thread. Where it splits one over threads, the ends of
# the parts are computed by other instructions than the rest, and may differ in their last bits.
ONE_THREAD = 1 << 15

_rows: dict[tuple, int] = {}


def row_invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x weight^T + bias`` for ``x [..., in]``, each row's bits independent of the other rows and of their number."""
    rows = x.reshape(-1, x.shape[-1])
    count = _rows_at_once(weight, bias)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % count))
    out = torch.cat([F.linear(part, weight, bias) for part in padded.split(count)])
    return out[: len(rows)].reshape(*x.shape[:-1], weight.shape[0])


def _rows_at_once(weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    """The number of rows for products with weights like this one; tried out at the first of them.

    The order in which a row is summed depends on shapes, strides, and the place in the product, not on what is summed:
    a row that gives the same bits at every place shows that the place does not matter.
    """
    key = (weight.shape, weight.stride(), weight.dtype, bias is None, torch.get_num_threads())
    if key in _rows:
        return _rows[key]
    sample = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    for count in ROWS:
        out = F.linear(sample.expand(count, -1).contiguous(), weight, bias)
        if torch.equal(out, out[:1].expand_as(out)):
            break
    if weight.any():  # zeros show nothing
        _rows[key] = count
        if count < ROWS[0]:
            logger.info('products with weights %s are computed %d rows at a time', tuple(weight.shape), count)
    return count


class CpuSiluAndMul(SiluAndMulImpl):
    """LMDeploy's gated activation with row-invariant results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` for ``x [..., 2 * ffn]``, whose first half is the gate."""
        gates, ups = x.reshape(-1, x.shape[-1]).chunk(2, -1)
        few = max(1, (ONE_THREAD - 1) // max(1, gates.shape[-1]))
        out = torch.cat([F.silu(gate) * up for gate, up in zip(gates.split(few), ups.split(few), strict=True)])
        return out.reshape(*x.shape[:-1], -1)


class CpuLinear(DefaultLinearImpl):
    """LMDeploy's linear layer with row-invariant results."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        all_reduce: bool = False,
        group: dist.ProcessGroup | None = None,
        rank: int = 0,
        scatter_size: list[int] | None = None,
    ) -> torch.Tensor:
        """Apply the layer to ``x [..., in]`` and sum over the tensor-parallel group if asked to."""
        out = row_invariant_linear(x, weight, bias)
        if not all_reduce:
            return out
        if scatter_size is not None:
            return gathering.reduce_scatter_by_sizes(out, rank, scatter_size, group)
        dist.all_reduce(out, group=group)
        return out


class CpuFusedMoE(FusedMoEImpl):
    """Mixture of experts, one expert after the other over the tokens that chose it."""

    def __init__(self, spec: FusedMoEBuildSpec) -> None:
        if spec.ep_size > 1:
            raise NotImplementedError('The CPU reference backend has no expert parallelism.')
        self.renormalize = spec.renormalize
        self.activation = CpuSiluAndMul().forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.LongTensor,
        gate_up_weights: torch.Tensor,
        down_weights: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        expert_list: list[int] | None = None,
        act_func: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: ``[tokens, hidden]``.
            topk_weights: ``[tokens, k]``.
            topk_ids: ``[tokens, k]``.
            gate_up_weights: ``[experts, 2 * ffn, hidden]``.
            down_weights: ``[experts, hidden, ffn]``.
            gate_up_bias: ``[experts, 2 * ffn]`` or None.
            down_bias: ``[experts, hidden]`` or None.
            expert_list: unused without expert parallelism.
            act_func: ``[tokens, 2 * ffn] -> [tokens, ffn]``; ``silu(gate) * up`` if None.

        Returns:
            ``[tokens, hidden]``.
        """
        if self.renormalize:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        # Each choice has its own row and the choices of a token are summed in the router's order, so that the sum
        # does not depend on which experts the other tokens use.
        choices = hidden_states.new_empty(*topk_ids.shape, hidden_states.shape[-1], dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            tokens, slots = torch.where(topk_ids == expert)
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            gate_up = row_invariant_linear(hidden_states[tokens], gate_up_weights[expert], bias)
            inner = (act_func or self.activation)(gate_up)
            bias = None if down_bias is None else down_bias[expert]
            choices[tokens, slots] = row_invariant_linear(inner, down_weights[expert], bias).float()
        output = torch.zeros_like(choices[:, 0])
        for slot, weights in enumerate(topk_weights.float().split(1, -1)):
            output += choices[:, slot] * weights
        return output.to(hidden_states.dtype)


class CpuLoRA(LoRAImpl):
    """Low-rank adapters, chosen per sequence."""

    def forward(
        self,
        x: torch.Tensor,
        lora_A: torch.Tensor,  # noqa: N803
        lora_B: torch.Tensor,  # noqa: N803
        base_output: torch.Tensor,
        adapter_info: AdapterInfo,
        ctx_mgr,
        colwise: bool,
        is_tp: bool = True,
    ) -> torch.Tensor:
        """Add ``scaling * (x A^T) B`` of each sequence's adapter to its rows of ``base_output``, in place.

        Args:
            x: ``[..., in]``, the step's packed tokens.
            lora_A: the adapters' ``[rank, in]`` one below the other.
            lora_B: the adapters' ``[rank, out]`` one below the other.
            base_output: ``[..., out of the packed layer]``.
            adapter_info: ranks and scalings by adapter, and the columns of ``base_output`` that belong to the layer.
            ctx_mgr: holder of the step's context.
            colwise: unused; both matrices are already sliced for tensor parallelism.
            is_tp: unused.
        """
        context = ctx_mgr.current_context()
        adapter_ids = context.local_adapter_ids
        if adapter_ids is None:
            return base_output
        rows = x.reshape(-1, x.shape[-1])
        added = rows.new_zeros(len(rows), lora_B.shape[1])
        start = 0
        for adapter, length in zip(adapter_ids.tolist(), context.q_seqlens.tolist(), strict=True):
            sequence = slice(start, start + length)
            start += length
            rank, offset = int(adapter_info.ranks[adapter]), int(adapter_info.rank_offsets[adapter])
            if rank == 0:
                continue
            ranks = slice(offset, offset + rank)
            low = row_invariant_linear(rows[sequence], lora_A[ranks])
            high = row_invariant_linear(low, lora_B[ranks].t())
            added[sequence] = high * adapter_info.scalings[adapter]
        columns = base_output[..., adapter_info.base_slice]
        columns += added.reshape(columns.shape)
        return base_output


class CpuMultinomialSampling(MultinomialSamplingImpl):
    """Samples each row from its own seed and offset, so that a seeded request can be repeated."""

    def forward(
        self,
        scores: torch.Tensor,
        seeds: torch.LongTensor,
        offsets: torch.LongTensor,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw one token per row.

        Args:
            scores: probabilities ``[batch, tokens]``.
            seeds: ``[batch]``, the requests' random seeds.
            offsets: ``[batch]``, the tokens that each request has so far.
            indices: token ids of the columns, ``[batch, tokens]``; the columns' own numbers if None.

        Returns:
            token ids ``[batch]``, int64.
        """
        uniform = [
            torch.rand((), generator=torch.Generator().manual_seed(seed * 1_000_003 + offset))
            for seed, offset in zip(seeds.tolist(), offsets.tolist(), strict=True)
        ]
        cumulative = scores.double().cumsum(-1)
        # The first column whose cumulative probability passes the draw: never one of zero probability. The draw is
        # below 1 by more than float64's rounding, so there always is such a column.
        draw = torch.stack(uniform).double()[:, None] * cumulative[:, -1:]
        column = (cumulative <= draw).sum(-1, keepdim=True)
        return column.view(-1) if indices is None else indices.gather(1, column).view(-1)
