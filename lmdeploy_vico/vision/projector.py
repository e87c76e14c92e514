"""The two connectors from patch tokens to visual tokens in the language model's width H."""

import torch
from torch import nn

from lmdeploy_vico.kernels.pixel_shuffle import pixel_shuffle

FULL_RATIO = 2  # 1024 patch tokens -> 256 visual tokens
COMPRESSED_RATIO = 4  # 1024 patch tokens -> 64 visual tokens


def full_projector(vit_width: int, llm_width: int) -> nn.Sequential:
    """``mlp1``: LN(4D) -> H -> GELU -> H."""
    return nn.Sequential(
        nn.LayerNorm(4 * vit_width),
        nn.Linear(4 * vit_width, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )


def compressed_projector(vit_width: int, llm_width: int) -> nn.Sequential:
    """``mlp2``: LN(16D) -> 2H -> GELU -> 2H -> GELU -> H."""
    # Identity where training had dropout, so that the indices are the checkpoint's: 0, 1, 4 and 7.
    return nn.Sequential(
        nn.LayerNorm(16 * vit_width),
        nn.Linear(16 * vit_width, 2 * llm_width),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(2 * llm_width, 2 * llm_width),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(2 * llm_width, llm_width),
    )


def project(mlp: nn.Sequential, patches: torch.Tensor, ratio: int) -> torch.Tensor:
    """Shuffle the patch tokens ``[B, 1024, D]`` of tiles routed to one branch and project them to ``[B, n, H]``."""
    return mlp(pixel_shuffle(patches, ratio))
