"""The operations of forward passes, from shapes alone: 2 FLOP a weight and token, and those of attention."""

from lmdeploy_vico.config import GRID

VIT_TOKENS = GRID * GRID + 1  # of a tile, with the class token


def vit_flops(weights: float, width: int, layers: int) -> float:
    """Return the FLOP of an InternViT for one tile.

    Args:
        weights: parameters of its blocks.
        width: channels of a token.
        layers: blocks.
    """
    return 2 * weights * VIT_TOKENS + 4 * VIT_TOKENS**2 * width * layers


def causal_attention_flops(tokens: float, width: int, layers: int) -> float:
    """Return the FLOP of a language model's attention in the prefill of one prompt: half of the square is masked.

    Args:
        tokens: of the prompt.
        width: channels of all query heads together.
        layers: of the model.
    """
    return 2 * tokens**2 * width * layers
