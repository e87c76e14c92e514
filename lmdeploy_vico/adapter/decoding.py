"""Guards LMDeploy's image decoding in a process that serves a ViCO model."""

from collections.abc import Callable
from typing import Any

import wrapt
from PIL import Image, ImageFile, UnidentifiedImageError


class ImageError(ValueError):
    """An image that cannot be decoded; LMDeploy answers 400 with the message."""


_GUARDED = ('load_bytes', 'load_base64', 'load_file')


def guard_image_decoding() -> None:
    """Refuse damaged pictures, and say in a sentence what is wrong with an image that cannot be decoded.

    Why: LMDeploy tells Pillow to accept truncated files, so half a picture would be answered as if it were whole, and
    reports every decoding error but ValueError as "Request preprocessing failed." Called when a ViCO model starts, so
    that other processes keep LMDeploy's behaviour. Can go when LMDeploy rejects truncated images and names the error.
    Idempotent.
    """
    from lmdeploy.vl.media.image import ImageMediaIO

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    for name in _GUARDED:
        method = ImageMediaIO.__dict__[name]
        if not isinstance(method, wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(ImageMediaIO, name, _explain)


def _explain(wrapped: Callable[..., Image.Image], instance: Any, args: Any, kwargs: Any) -> Image.Image:
    del instance
    try:
        return wrapped(*args, **kwargs)
    except UnidentifiedImageError:
        raise ImageError('The data is not an image in a format that can be read.') from None
    except Image.DecompressionBombError as error:
        raise ImageError(f'The image is too large: {error}') from None
    except FileNotFoundError:
        raise ImageError('The image file does not exist.') from None
    except ImageError:
        raise  # load_base64 calls load_bytes
    except (OSError, SyntaxError, EOFError, IndexError, ValueError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise ImageError(f'The image is damaged or truncated: {error}') from None
