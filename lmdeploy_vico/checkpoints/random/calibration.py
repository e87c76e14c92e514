"""Fit the few layers of a random checkpoint on which its use for tests depends.

On synthetic tiles, the patch filters and the last layers of the projectors are scaled to outputs with a standard
deviation of one. The router's last layer is fitted so that smooth tiles score above 0.5 (compressed) and detailed ones
below (full). This works for photographs, pages and flat colours. It does not work for noise of full contrast, which is
out of reach of a linear layer.

All is computed in float64, so that the result does not depend on how a matrix product is split over threads.
"""

import torch
from torch import Tensor

from lmdeploy_vico.checkpoints.names import COMPRESSED_PROJECTOR, FULL_PROJECTOR, GATING, VIT
from lmdeploy_vico.checkpoints.random import forward
from lmdeploy_vico.checkpoints.random.tiles import detail, normalize, synthetic_tiles
from lmdeploy_vico.config import InternViTConfig

# The log detail at which a tile scores 0.5; the standard deviation of the scores' log odds over the synthetic tiles.
DETAIL_CENTER = -3.5
ODDS_SPREAD = 2.5
RIDGE = 0.1
CHUNK = 12  # tiles that are computed at a time
CLASSIFIER = f'{GATING}gate.1'


def as_stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return float64 copies that hold what the bfloat16 checkpoint will hold."""
    return {name: tensor.bfloat16().double() for name, tensor in weights.items()}


@torch.no_grad()
def calibrate(weights: dict[str, Tensor], vision: InternViTConfig) -> None:
    """Change the vision-side ``weights`` (float64, by checkpoint name) in place; all are rounded to bfloat16 values."""
    tiles = synthetic_tiles()
    pixels = normalize(tiles)
    weights.update(as_stored(weights))
    _standardize_filters(weights, pixels)
    size = vision.num_hidden_layers, vision.num_attention_heads
    tokens = torch.cat([forward.vit(weights, x, *size) for x in pixels.split(CHUNK)])
    # Every third tile is enough for two moments per channel.
    _standardize_projector(weights, tokens[::3], f'{FULL_PROJECTOR}3', 2)
    if f'{CLASSIFIER}.weight' in weights:
        _standardize_projector(weights, tokens[::3], f'{COMPRESSED_PROJECTOR}7', 4)
        _fit_gate(weights, tokens, detail(tiles))


def _store(weights: dict[str, Tensor], name: str, weight: Tensor, bias: Tensor) -> None:
    weights[f'{name}.weight'], weights[f'{name}.bias'] = weight.bfloat16().double(), bias.bfloat16().double()


def _standardize_filters(weights: dict[str, Tensor], pixels: Tensor) -> None:
    name = f'{VIT}embeddings.patch_embedding'
    y = torch.cat([forward.patch_features(weights, x) for x in pixels.split(CHUNK)]).flatten(0, 1)
    std = y.std(dim=0)
    weight, bias = weights[f'{name}.weight'], weights[f'{name}.bias']
    _store(weights, name, weight / std[:, None, None, None], (bias - y.mean(dim=0)) / std)


def _standardize_projector(weights: dict[str, Tensor], tokens: Tensor, last: str, ratio: int) -> None:
    y = torch.cat([forward.project(weights, x, ratio) for x in tokens.split(CHUNK)]).flatten(0, 1)
    std = y.std(dim=0)
    weight, bias = weights[f'{last}.weight'], weights[f'{last}.bias']
    _store(weights, last, weight / std[:, None], (bias - y.mean(dim=0)) / std)


def _fit_gate(weights: dict[str, Tensor], tokens: Tensor, log_detail: Tensor) -> None:
    """Fit the last layer: a ridge regression of tiles' smoothness on its inputs, scaled to log odds of compression."""
    features = torch.cat([forward.gate_features(weights, x) for x in tokens.split(CHUNK)])
    smoothness = DETAIL_CENTER - log_detail
    mean, center = features.mean(dim=0), smoothness.mean()
    x = features - mean
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(x.T @ x + ridge, x.T @ (smoothness - center))
    scale = ODDS_SPREAD / (x @ w).std()
    # Two classes: the log odds are the difference of the two outputs.
    weight = torch.stack([scale * w / 2, -scale * w / 2]).bfloat16().double()
    offset = (scale * center - mean @ (weight[0] - weight[1])) / 2
    _store(weights, CLASSIFIER, weight, torch.stack([offset, -offset]))
