"""The absorbed router against ``nn.MultiheadAttention`` and plain layers, in float64 on the same rounded weights."""

import numpy as np
import pytest
import torch
from torch import nn

from lmdeploy_vico.vision.model.router import AttentionPooling, Gating

TILES, TOKENS = 12, 256
# Relative norm error of the pooled vector, and the largest error of a score.
POOLED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SCORE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


@torch.no_grad()
def plain_pooling(weights, x):
    """o = LN(MHA(o, x, x)) four times, from the query token; the second attention and norm serve steps 2 to 4."""
    width = x.shape[-1]
    attention = {}
    for step in (1, 2):
        attention[step] = nn.MultiheadAttention(width, 16, batch_first=True, dtype=x.dtype)
        prefix = f'attn{step}.'
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        attention[step].load_state_dict(state)
    pooled = weights['query_token'].expand(len(x), 1, -1)
    for step in (1, 2, 2, 2):
        pooled, _ = attention[step](pooled, x, x)
        norm = weights[f'norm{step}.weight'], weights[f'norm{step}.bias']
        pooled = nn.functional.layer_norm(pooled, (width,), *norm, 1e-5)
    return pooled[:, 0]


def plain_gate(weights, pooled):
    def part(name):
        return weights[f'{name}.weight'], weights[f'{name}.bias']

    width = pooled.shape[-1]
    for block in ('block1', 'block2', 'block3', 'block4'):
        hidden = nn.functional.gelu(nn.functional.linear(pooled, *part(f'{block}.0')))
        out = nn.functional.linear(hidden, *part(f'{block}.3'))
        pooled = pooled + nn.functional.layer_norm(out, (width,), *part(f'{block}.5'), 1e-5)
    logits = nn.functional.linear(nn.functional.layer_norm(pooled, (width,), *part('gate.0'), 1e-5), *part('gate.1'))
    return torch.softmax(logits, -1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def dtype(request):
    return request.param


@pytest.fixture(params=[64, 208])
def routers(request, dtype):
    """Pooling and gate with random weights whose scores spread, rounded to the dtype."""
    torch.manual_seed(3)
    modules = AttentionPooling(request.param), Gating(request.param)
    for module in modules:
        for name, value in module.named_parameters():
            if value.dim() > 1:
                nn.init.normal_(value, std=1.5 / value.shape[-1] ** 0.5)
            else:
                nn.init.normal_(value, mean=1.0 if 'norm' in name and name.endswith('weight') else 0.0, std=0.2)
        module.to(dtype).freeze()
    return modules


def tokens(kind, width, dtype):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TILES, TOKENS + 1, width, generator=generator)
    if kind == 'large mean':
        x += 30 * torch.randn(width, generator=generator)
    if kind == 'near ties':
        x = x[:1] + 1e-2 * x
    if kind == 'outliers':  # a few channels far above the others, as ViTs have them
        x[..., :: width // 4] *= 20
    return x.to(dtype)[:, 1:]


@pytest.mark.parametrize('kind', ['random', 'large mean', 'near ties', 'outliers'])
def test_equals_plain_attention(routers, dtype, kind):
    pooling, gate = routers
    x = tokens(kind, pooling.query_token.shape[1], dtype)
    weights, gate_weights = ({n: v.double() for n, v in module.state_dict().items()} for module in routers)
    expected = plain_pooling(weights, x.double())
    expected_scores = plain_gate(gate_weights, expected)[:, 0]
    assert np.ptp(expected_scores.numpy()) > 1e-4  # the scores tell tiles apart

    pooled = pooling(x)
    scores = gate(pooled)[:, 0]
    assert (pooled - expected).norm() / expected.norm() <= POOLED[dtype]
    assert (scores - expected_scores).abs().max() <= SCORE[dtype]
    assert torch.equal(route(scores), route(expected_scores)), 'a decision flipped'


def route(scores):
    return scores > torch.quantile(scores, 0.5)
