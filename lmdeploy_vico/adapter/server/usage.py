"""``usage.prompt_tokens_details``: how many of a prompt's tokens are visual, of how many tiles, and what was saved.

The fields are added to LMDeploy's class by ``adapter/patches/server.py``.
"""

from collections.abc import Callable, Mapping, Sequence

from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.stage.jobs import EncodedImage


def count_tiles(images: Sequence[EncodedImage], pressed: int) -> None:
    """Note how many visual tokens each tile of the prompt of the request that is served has.

    Args:
        images: of the prompt.
        pressed: tiles that are compressed because the language model is overloaded.
    """
    request = served_request()
    if request is not None:
        request.tile_tokens = [count for image in images for count in image.tokens.tile_tokens]
        request.pressed_tiles = pressed


def _tile_tokens() -> Sequence[int]:
    """Those of the request that is being served; empty outside a request."""
    request = served_request()
    return () if request is None else request.tile_tokens


def _image_tokens() -> int:
    return sum(_tile_tokens())


def _image_tiles() -> int:
    return len(_tile_tokens())


def _compressed_tiles() -> int:
    return sum(count == TOKENS_COMPRESSED for count in _tile_tokens())


def _image_tokens_saved() -> int:
    return TOKENS_FULL * _image_tiles() - _image_tokens()


def _pressure_compressed_tiles() -> int:
    request = served_request()
    return 0 if request is None else request.pressed_tiles


# By the names of the fields, what they say of the request that is being served.
FIELDS: Mapping[str, Callable[[], int]] = {
    'image_tokens': _image_tokens,
    'image_tiles': _image_tiles,
    'compressed_tiles': _compressed_tiles,
    'image_tokens_saved': _image_tokens_saved,
    'pressure_compressed_tiles': _pressure_compressed_tiles,
}
