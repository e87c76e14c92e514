"""The torch implementations against the formulas of their docstrings, written as loops."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy_vico.kernels.attention_pool import attention_pool
from lmdeploy_vico.kernels.pixel_shuffle import pixel_shuffle


@pytest.mark.parametrize('ratio, side', [(2, 6), (4, 8), (3, 9)])
def test_pixel_shuffle(rng, ratio, side):
    x = rng.standard_normal((2, side, side, 5)).astype(np.float32)
    out = pixel_shuffle(torch.from_numpy(x).flatten(1, 2), ratio).numpy()
    merged = side // ratio
    for i in range(merged):
        for j in range(merged):
            for dy in range(ratio):
                for dx in range(ratio):
                    channels = slice((dy * ratio + dx) * 5, (dy * ratio + dx + 1) * 5)
                    np.testing.assert_array_equal(
                        out[:, i * merged + j, channels], x[:, ratio * i + dy, ratio * j + dx]
                    )


@pytest.mark.parametrize('patches, ratio', [(35, 2), (36, 4)])
def test_pixel_shuffle_refuses_what_does_not_divide(patches, ratio):
    with pytest.raises(ValueError, match='^x: '):
        pixel_shuffle(torch.zeros(1, patches, 3), ratio)


@pytest.mark.parametrize('queries', [1, 3])
def test_attention_pool(rng, queries):
    x, u = rng.standard_normal((3, 11, 8)), rng.standard_normal((queries, 4, 8))
    out = attention_pool(torch.from_numpy(x).float(), torch.from_numpy(u).float())
    for tile in range(3):
        for head in range(4):
            logits = x[tile] @ u[tile % queries, head]
            weights = np.exp(logits - logits.max())
            expected = (weights / weights.sum()) @ x[tile]
            np.testing.assert_allclose(out[tile, head].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_attention_pool_accepts_a_view_without_the_class_token():
    x = torch.randn(2, 12, 8)
    u = torch.randn(1, 4, 8)
    assert torch.equal(attention_pool(x[:, 1:], u), attention_pool(x[:, 1:].contiguous(), u))


@pytest.mark.parametrize('shape', [(2, 4, 8), (1, 4, 7)])
def test_attention_pool_names_a_bad_argument(shape):
    with pytest.raises(ValueError, match='^u: '):
        attention_pool(torch.zeros(3, 5, 8), torch.zeros(shape))


def test_kernels_know_nothing_above_them():
    for file in (Path(__file__).parents[2] / 'kernels').glob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                allowed = ('torch', 'triton', 'lmdeploy_vico.kernels')
                assert name.startswith(allowed), f'{file.name} imports {name}'
