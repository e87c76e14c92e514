"""Pixel shuffle: neighbouring patches of a tile concatenated into one wider token.

``out[(i, j), (dy * r + dx) * D + c] = x[r * i + dy, r * j + dx, c]`` for 0 <= i, j < side / r and 0 <= dy, dx < r.
"""

import torch


def pixel_shuffle(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Merge every ``ratio`` x ``ratio`` square of patches, row-major (ps_version "v2").

    Args:
        x: patch tokens of whole tiles, ``[B, side * side, D]``, any batch stride.
        ratio: 2 for the 256-token projector, 4 for the 64-token one.

    Returns:
        ``[B, (side / ratio) ** 2, ratio * ratio * D]``, contiguous, in x's dtype.
    """
    tiles, patches, width = x.shape
    side = round(patches**0.5)
    if side * side != patches or side % ratio:
        raise ValueError(f'x: {patches} patches do not form a square whose side divides by {ratio}')
    merged = side // ratio
    squares = x.reshape(tiles, merged, ratio, merged, ratio, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, merged * merged, ratio * ratio * width)
