"""The two connectors from patch tokens to visual tokens in the language model's width H."""

import torch
from torch import nn

from lmdeploy_vico.kernels.pixel_shuffle import Norm, Shuffled, pixel_shuffle

EPS = 1e-5


def full_projector(vit_width: int, llm_width: int) -> nn.Sequential:
    """``mlp1``: LN(4D) -> H -> GELU -> H."""
    return nn.Sequential(
        nn.LayerNorm(4 * vit_width, eps=EPS),
        nn.Linear(4 * vit_width, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )


def compressed_projector(vit_width: int, llm_width: int) -> nn.Sequential:
    """``mlp2``: LN(16D) -> 2H -> GELU -> 2H -> GELU -> H."""
    # Identity where training had dropout, so that the indices are the checkpoint's: 0, 1, 4 and 7.
    return nn.Sequential(
        nn.LayerNorm(16 * vit_width, eps=EPS),
        nn.Linear(16 * vit_width, 2 * llm_width),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(2 * llm_width, 2 * llm_width),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(2 * llm_width, llm_width),
    )


def shuffle(
    patches: torch.Tensor,
    compressed: torch.Tensor,
    full_mlp: nn.Sequential,
    compressed_mlp: nn.Sequential,
    room: tuple[int, int],
) -> Shuffled:
    """Pixel shuffle and first LayerNorm of both projectors: patch tokens ``[B, 1024, D]`` to their input rows."""
    return pixel_shuffle(patches, compressed, _norm(full_mlp), _norm(compressed_mlp), EPS, room)


def _norm(mlp: nn.Sequential) -> Norm:
    layer = mlp[0]
    assert isinstance(layer, nn.LayerNorm)
    return Norm(layer.weight, layer.bias)
