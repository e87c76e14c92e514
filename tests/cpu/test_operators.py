"""The CPU operators by themselves, against direct formulas."""

import itertools

import pytest
import torch
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.flash_attention import FlashAttentionBuildSpec
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec
from lmdeploy.pytorch.backends.qmodules import LinearW8A8BuildSpec

from lmdeploy_vico.cpu import attention, operators
from lmdeploy_vico.cpu.attention import CpuAttentionMetadata, CpuFlashAttention, CpuPagedAttention
from lmdeploy_vico.cpu.backend import CpuOpsBackend

HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture
def with_threads():
    """``with_threads(n)``: compute on n threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def paged(**changes):
    options = {
        'num_heads': HEADS,
        'head_dim': DIM,
        'scale': None,
        'num_kv_heads': KV_HEADS,
        'v_head_dim': DIM,
        'alibi': False,
        'sliding_window': None,
        'logit_softcapping': 0.0,
        'causal': True,
        'use_flash_mla': False,
        'mla_index_topk': None,
        'learnable_sink': False,
        'block_sparse_size': 1,
    }
    return PagedAttentionBuildSpec(**(options | changes))


def naive(query, key, value, window=None, sinks=None, soft_cap=None, causal=True):
    """Attention of one sequence by loops over heads and queries, in float64."""
    q_len, kv_len = len(query), len(key)
    out = torch.zeros(q_len, HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        k, v = key[:, head * KV_HEADS // HEADS].double(), value[:, head * KV_HEADS // HEADS].double()
        for row in range(q_len):
            position = kv_len - q_len + row
            last = position + 1 if causal else kv_len
            first = 0 if window is None else max(0, position - window)
            scores = k[first:last] @ query[row, head].double() / DIM**0.5
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = scores.exp()
            weights = weights / (weights.sum() + (0 if sinks is None else sinks[head].double().exp()))
            out[row, head] = weights @ v[first:last]
    return out.float()


@pytest.mark.parametrize('page_size', [64, 128])
@pytest.mark.parametrize(
    'changes', [{}, {'sliding_window': 20}, {'logit_softcapping': 2.0}, {'learnable_sink': True}], ids=str
)
def test_paged_attention(page_size, changes):
    generator = torch.Generator().manual_seed(0)
    # Cached tokens, new tokens: a chunk, a decoding step, a fresh prompt longer than a block of queries.
    history, new = (100, 130, 0), (30, 1, 40)
    lengths = [h + n for h, n in zip(history, new, strict=True)]
    pages = [-(-length // page_size) for length in lengths]
    table = torch.zeros(3, max(pages), dtype=torch.int32)
    free = torch.randperm(sum(pages) + 2, generator=generator).tolist()
    for row, count in enumerate(pages):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    # LMDeploy's caches are strided views of a pool, and a page that nobody wrote to may hold anything.
    pool = torch.full((sum(pages) + 2, 2, page_size, KV_HEADS, DIM), float('nan'))
    k_cache, v_cache = pool[:, 0], pool[:, 1]
    keys = [torch.randn(length, KV_HEADS, DIM, generator=generator) for length in lengths]
    values = [torch.randn(length, KV_HEADS, DIM, generator=generator) for length in lengths]
    queries = [torch.randn(n, HEADS, DIM, generator=generator) for n in new]
    for row, past in enumerate(history):
        for position in range(past):
            page = table[row, position // page_size]
            k_cache[page, position % page_size] = keys[row][position]
            v_cache[page, position % page_size] = values[row][position]
    sinks = torch.randn(HEADS, generator=generator) if changes.get('learnable_sink') else None

    output = CpuPagedAttention(paged(**changes)).forward(
        torch.cat(queries),
        torch.cat([key[past:] for key, past in zip(keys, history, strict=True)]),
        torch.cat([value[past:] for value, past in zip(values, history, strict=True)]),
        k_cache,
        v_cache,
        CpuAttentionMetadata(is_decoding=False, block_offsets=table, q_lens=new, kv_lens=tuple(lengths)),
        learnable_sink=sinks,
    )

    expected = [
        naive(q, k, v, changes.get('sliding_window'), sinks, changes.get('logit_softcapping'))
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'options', [{}, {'window': 20}, {'soft_cap': 2.0}, {'sinks': True}, {'alibi': True}, {'bfloat16': True}], ids=str
)
def test_attention_of_a_token_does_not_depend_on_what_is_computed_with_it(options):
    """The whole prompt at once, in chunks, after a cached prefix, token by token."""
    generator = torch.Generator().manual_seed(9)
    dtype = torch.bfloat16 if options.get('bfloat16') else torch.float32
    length = 150
    query = torch.randn(length, HEADS, DIM, generator=generator).to(dtype)
    key, value = (torch.randn(length, KV_HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    rule = attention.Rule(DIM**-0.5, True, options.get('window', 0), options.get('soft_cap', 0.0))
    extra = [torch.rand(HEADS, generator=generator) if options.get(name) else None for name in ('sinks', 'alibi')]
    whole = attention.attend(query, key, value, rule, *extra)
    for cuts in ([64], [10, 11, 64, 128], [1], [149], [33, 77], list(range(1, length))):
        for start, stop in itertools.pairwise([0, *cuts, length]):
            part = attention.attend(query[start:stop], key[:stop], value[:stop], rule, *extra)
            assert torch.equal(part, whole[start:stop]), (start, stop)


def test_flash_attention_stays_within_its_sequences():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 9])
    starts = torch.tensor([0, 5])
    query = torch.randn(14, HEADS, DIM, generator=generator)
    key, value = (torch.randn(14, KV_HEADS, DIM, generator=generator) for _ in range(2))
    spec = FlashAttentionBuildSpec(HEADS, DIM, None, KV_HEADS, DIM, False, None, 0.0)
    output = CpuFlashAttention(spec).forward(query, key, value, starts, lengths, starts, lengths)
    parts = [naive(query[s], key[s], value[s], causal=False) for s in (slice(0, 5), slice(5, 14))]
    torch.testing.assert_close(output, torch.cat(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('inputs', 'outputs'), [(64, 8), (64, 320), (256, 96), (1024, 3072), (2048, 2048)])
def test_linear_rows_do_not_depend_on_their_number(threads, dtype, inputs, outputs, with_threads):
    with_threads(threads)
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    x = torch.randn(200, inputs, generator=generator).to(dtype)
    all_rows = operators.row_invariant_linear(x, weight)
    torch.testing.assert_close(all_rows, torch.nn.functional.linear(x, weight))
    for count in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 100, 129):
        assert torch.equal(operators.row_invariant_linear(x[:count], weight), all_rows[:count]), count
        assert torch.equal(operators.row_invariant_linear(x[-count:], weight), all_rows[-count:]), count


def test_no_rows():
    """A chunk of a prompt has none to score where log probabilities are asked for from a later token on."""
    assert operators.row_invariant_linear(torch.zeros(1, 0, 8), torch.ones(3, 8)).shape == (1, 0, 3)


def test_fewer_rows_where_a_place_in_the_product_matters(monkeypatch):
    """A library whose last rows are summed in another order, unless there is only one."""

    def linear(x, weight, bias=None):
        assert bias is None
        products = x[:, None] * weight
        out = products.sum(-1)
        if len(x) > 8:
            out[-1] = products[-1].flip(-1).cumsum(-1)[..., -1]
        return out

    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(40, 96, generator=generator), torch.randn(48, 96, generator=generator)
    monkeypatch.setattr(operators.F, 'linear', linear)
    monkeypatch.setattr(operators, '_rows', {})
    all_rows = operators.row_invariant_linear(x, weight)
    assert list(operators._rows.values()) == [8]
    assert all(torch.equal(operators.row_invariant_linear(x[i : i + 1], weight)[0], all_rows[i]) for i in range(40))
    monkeypatch.setattr(operators, '_rows', {})
    operators.row_invariant_linear(x, torch.zeros_like(weight))
    assert not operators._rows  # zeros show nothing


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('ffn', [64, 100, 1000])
def test_activation_of_a_row_does_not_depend_on_their_number(threads, dtype, ffn, with_threads):
    with_threads(threads)
    x = torch.randn(200, 2 * ffn, generator=torch.Generator().manual_seed(7)).to(dtype)
    forward = operators.CpuSiluAndMul().forward
    all_rows = forward(x)
    torch.testing.assert_close(all_rows, torch.nn.functional.silu(x[:, :ffn]) * x[:, ffn:])
    for count in (1, 2, 3, 5, 17, 33, 63, 100, 129):
        assert torch.equal(forward(x[:count]), all_rows[:count]), count
        assert torch.equal(forward(x[-count:]), all_rows[-count:]), count


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_a_token_do_not_depend_on_the_others(dtype):
    generator = torch.Generator().manual_seed(8)
    tokens, experts, hidden, ffn, top_k = 70, 6, 32, 48, 3
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    gate_up = (torch.randn(experts, 2 * ffn, hidden, generator=generator) / 6).to(dtype)
    down = (torch.randn(experts, hidden, ffn, generator=generator) / 6).to(dtype)
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    forward = operators.CpuFusedMoE(FusedMoEBuildSpec(top_k, experts, True, hidden, 1, None, 0, dtype, 1)).forward
    together = forward(x, weights, ids, gate_up, down)
    for size in (1, 2, 7, 33):
        some = torch.randperm(tokens, generator=generator)[:size]
        assert torch.equal(forward(x[some], weights[some], ids[some], gate_up, down), together[some])


def test_mixture_of_experts():
    generator = torch.Generator().manual_seed(4)
    tokens, experts, hidden, ffn, top_k = 11, 6, 32, 48, 3
    spec = FusedMoEBuildSpec(top_k, experts, True, hidden, 1, None, 0, torch.float32, 1)
    x = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(experts, 2 * ffn, hidden, generator=generator) / 6
    down = torch.randn(experts, hidden, ffn, generator=generator) / 6
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    output = operators.CpuFusedMoE(spec).forward(x, weights, ids, gate_up, down)
    expected = torch.zeros_like(x)
    for token in range(tokens):
        for weight, expert in zip(weights[token] / weights[token].sum(), ids[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(output, expected)


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(4000, 4)
    seeds = torch.arange(4000)
    draw = operators.CpuMultinomialSampling().forward
    drawn = draw(probabilities, seeds, torch.zeros(4000, dtype=torch.long))
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, probabilities[0], rtol=0, atol=0.03)
    assert share[3] == 0
    assert not torch.equal(drawn, draw(probabilities, seeds, torch.ones(4000, dtype=torch.long)))
    ids = torch.tensor([[7, 5, 3, 1]]).expand(4000, 4)
    assert torch.equal(draw(probabilities, seeds, torch.zeros(4000, dtype=torch.long), ids), 7 - 2 * drawn)


def test_what_is_missing_is_said_in_a_sentence():
    with pytest.raises(NotImplementedError, match='has no operator LinearW8A8: serve this checkpoint on a CUDA device'):
        CpuOpsBackend.build_op(LinearW8A8BuildSpec(16, 16, False, torch.float16, torch.int8))
    with pytest.raises(NotImplementedError, match='no multi-head latent attention'):
        CpuOpsBackend.build_op(paged(use_flash_mla=True))
