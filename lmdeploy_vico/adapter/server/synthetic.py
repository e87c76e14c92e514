"""Image items whose visual tokens are made up, so that a benchmark can measure the language model alone.

They are accepted only where the option ``synthetic_images`` is on. Such an image is not cut, encoded, routed or
projected. Its visual tokens are assembled, handed over and prefilled like those of any other image.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmdeploy_vico.choices import Compression, Pressed
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import round_down
from lmdeploy_vico.wording import shown

KEY = 'synthetic'
FIELDS = ('tiles', 'compressed', 'seed')
NEEDED = ('tiles', 'seed')
MAX_SEED = 2**63 - 1
STARTS = 4096  # slices of the random rows that seeds choose from


@dataclass(frozen=True)
class SyntheticImage:
    """Visual tokens that an image item asks for without an image.

    Attributes:
        tiles: whole number of tiles, a thumbnail included.
        compressed: how many of them have 64 tokens; the others have 256.
        seed: the same seed gives the same visual tokens, another seed others.
        stated: whether the client said how many.
        salt: part of their names, as of those of pictures.
    """

    tiles: int
    compressed: int
    seed: int
    stated: bool = True
    salt: str = ''

    @property
    def tile_tokens(self) -> list[int]:
        """Visual tokens of each tile, those of the compressed tiles first."""
        return [TOKENS_COMPRESSED] * self.compressed + [TOKENS_FULL] * (self.tiles - self.compressed)


def under_pressure(image: SyntheticImage, compression: Compression) -> SyntheticImage:
    """The image with as many tiles compressed as pressure asks for, where its client left that to the server."""
    if image.stated or not isinstance(compression, Pressed):
        return image
    return replace(image, compressed=round_down(compression.extra, image.tiles))


def synthetic_image(params: Mapping[str, Any], max_tiles: int) -> SyntheticImage:
    """Read the keys of an image item, one of which is "synthetic".

    Args:
        params: the keys beside the url, whose image is ignored.
        max_tiles: the most tiles that an image may ask for, thumbnail not counted.

    Raises:
        ValueError: something is malformed; the text becomes the body of a 400.
    """
    others = sorted(params.keys() - {KEY})
    if others:
        raise ValueError(
            f'An image item with "{KEY}" has no key {shown(others[0])}: its tokens are not made of an image.'
        )
    wanted = params[KEY]
    if not isinstance(wanted, Mapping) or not set(NEEDED) <= set(wanted) <= set(FIELDS):
        raise ValueError(f'"{KEY}" must be an object with the keys {", ".join(FIELDS)}, not {shown(wanted)}.')
    tiles = _integer(wanted, 'tiles', 1, max_tiles + 1)
    return SyntheticImage(
        tiles=tiles,
        compressed=_integer(wanted, 'compressed', 0, tiles) if 'compressed' in wanted else 0,
        seed=_integer(wanted, 'seed', 0, MAX_SEED),
        stated='compressed' in wanted,
    )


class SyntheticEncoder:
    """Gives synthetic images their visual tokens: slices of random rows that are made once.

    Args:
        width: of a visual token, H.
        dtype: the language model's.
        max_tiles: the most tiles of an image, a thumbnail included.
    """

    def __init__(self, width: int, dtype: torch.dtype, max_tiles: int) -> None:
        rows = torch.empty(max_tiles * TOKENS_FULL + STARTS, width, dtype=dtype)
        # As large as the embeddings of a language model that is initialised at random.
        self._rows = rows.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(0))

    def submit(self, images: Sequence[SyntheticImage]) -> 'Future[list[EncodedImage]]':
        """Return what ``VisionStage.submit`` returns for images that have to be encoded; it is done at once."""
        future: Future[list[EncodedImage]] = Future()
        future.set_result([self.encode(image) for image in images])
        return future

    def encode(self, image: SyntheticImage) -> EncodedImage:
        """Visual tokens ``[n, H]``, those of the compressed tiles first."""
        tile_tokens = image.tile_tokens
        # Names everything that the rows depend on, as the prefix cache takes equal digests for equal contents.
        name = f'{KEY}:{image.seed}:{image.tiles}:{image.compressed}'
        start = int.from_bytes(_digest(name), 'little') % STARTS
        embeddings = self._rows[start : start + sum(tile_tokens)]
        scores = [1.0] * image.compressed + [0.0] * (image.tiles - image.compressed)
        digests = [_digest(f'{name}:{index}:{image.salt}') for index in range(image.tiles)]
        return EncodedImage(VisualTokens(embeddings, tile_tokens, scores), digests)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _integer(values: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f'"{KEY}": {name} must be an integer from {least} to {most}, not {shown(value)}.')
    return value
