"""Files of pictures and videos that several modules decode."""

import io

import numpy as np
from PIL import Image

# Pillow's names of what is decoded, and how a file of each is written so that its pixels come back.
FORMATS = {
    'PNG': {},
    'JPEG': {'quality': 95},
    'WEBP': {'lossless': True},
    'AVIF': {'quality': 90},
    'GIF': {},
    'BMP': {},
    'TIFF': {},
    'PPM': {},
}


def noise(width: int = 56, height: int = 40, seed: int = 3) -> Image.Image:
    """A picture of which no part is like another."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
    """The pixels as LMDeploy decodes a file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
