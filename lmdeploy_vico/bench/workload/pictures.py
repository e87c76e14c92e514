"""Distinct pictures as data URLs, made before the clock starts."""

import base64
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from lmdeploy_vico.config import IMAGE_SIZE

QUALITY = 85


def make_pictures(count: int, size: tuple[int, int], seed: int, done: Callable[[], object] = lambda: None) -> list[str]:
    """JPEG pictures of ``(width, height)`` with smooth and noisy parts, no two of which share a tile.

    They are views of one larger canvas. Each begins elsewhere within a tile, so that no tile of one can be a tile of
    another: neither a prefix cache nor a cache of tiles finds anything again, up to 200,704 pictures.

    Args:
        done: called after every picture.
    """
    width, height = size
    canvas = _canvas(width + IMAGE_SIZE, height + IMAGE_SIZE, seed)
    starts = np.random.default_rng(seed).permutation(IMAGE_SIZE * IMAGE_SIZE)

    def encode(index: int) -> str:
        top, left = divmod(int(starts[index % len(starts)]), IMAGE_SIZE)
        buffer = io.BytesIO()
        canvas.crop((left, top, left + width, top + height)).save(buffer, 'JPEG', quality=QUALITY)
        done()
        return f'data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow encodes without the GIL
        try:
            return list(threads.map(encode, range(count)))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # interrupted: the rest is not waited for
            raise


def _canvas(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture with noise in a third of its squares, which are finer than tiles: routing has a choice."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.integers(-48, 49, (height, width, 1), dtype=np.int16)
    square = IMAGE_SIZE // 2
    noisy = ((np.arange(height)[:, None] // square + np.arange(width)[None, :] // square) % 3 == 0)[..., None]
    return Image.fromarray(np.clip(smooth + noise * noisy, 0, 255).astype(np.uint8))
