"""What is checked when LMDeploy decodes images and videos in a process that serves a ViCO model.

The functions are put around LMDeploy's own by ``adapter/patches/media.py``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.served import TooLargeError, charge
from lmdeploy_vico.config import IMAGE_SIZE
from lmdeploy_vico.vision.tiling import cut_tiles


class ImageError(ValueError):
    """An image that cannot be decoded; LMDeploy answers 400 with the message."""


class VideoError(ValueError):
    """A video that cannot be decoded; LMDeploy answers 400 with the message."""


# Containers may announce a few frames more than they hold; when more than this share of a video's frames cannot be
# read, and more than one, it is damaged.
_UNREADABLE = 0.1
# Frames in a row; a stream may recover from fewer.
_END = 100
# Bytes of a pixel. Pillow keeps four of a picture, and as many again come and go when it is converted and cut.
_PICTURE = 8
# LMDeploy keeps three of a video's frame, and Pillow four.
_FRAME = 7
# One frame at a time is there in full size: OpenCV's, Pillow's, and what resizing takes.
_FULL_FRAME = 16
# Videos that would take more bytes are resized frame by frame. Others later, which is quicker: by several threads.
_LARGE = 2**28


def load_image(load: Callable[[], Image.Image]) -> Image.Image:
    """Return what ``load`` does, or raise ImageError with a sentence that says what is wrong with the data."""
    try:
        return load()
    except UnidentifiedImageError:
        raise ImageError('The data is not an image in a format that can be read.') from None
    except Image.DecompressionBombError as error:
        raise ImageError(f'The image is too large: {error}') from None
    except FileNotFoundError:
        raise ImageError('The image file does not exist.') from None
    except MemoryError:
        raise ImageError('The image is too large to be decoded: the memory does not suffice.') from None
    except (ImageError, TooLargeError):
        raise  # load_base64 calls load_bytes
    except (OSError, SyntaxError, EOFError, IndexError, ValueError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise ImageError(f'The image is damaged or truncated: {error}') from None


def charge_picture(picture: ImageFile.ImageFile) -> None:
    """Count the memory that a picture will take when it is decoded; raises if there is not as much."""
    width, height = picture.size
    charge(width * height * _PICTURE)


def make_video_loader(make: Callable[[], None]) -> None:
    """Call ``make``, or raise VideoError if the package that reads videos is missing."""
    try:
        make()
    except ImportError as error:
        raise VideoError(
            f'This server cannot read videos until opencv-python-headless is installed on it: {error}'
        ) from error


def load_video(loader: Any, load: Callable[[], Any]) -> Any:
    """Return the frames and metadata that ``load`` does, or raise VideoError with a sentence that says what is wrong.

    Args:
        loader: LMDeploy's VideoMediaIO.
        load: its method, with its arguments.
    """
    try:
        frames, metadata = load()
    except FileNotFoundError:
        raise VideoError('The video file does not exist.') from None
    except MemoryError:
        raise VideoError('The frames of the video are too large to be decoded; ask for fewer num_frames.') from None
    except ImageError as error:
        raise VideoError(f'A frame of the video cannot be read. {error}') from None
    except (VideoError, TooLargeError, OverloadError):
        raise  # load_base64 calls load_bytes
    except Exception as error:
        # The backends raise whatever their arithmetic makes of a damaged header.
        detail = f': {error}' if isinstance(error, OSError | ValueError) and str(error) else '.'
        raise VideoError(f'The data is not a video that can be read, or it is damaged{detail}') from None
    _refuse_missing_frames(loader, len(frames), metadata)
    if metadata['video_backend'] not in ('opencv', 'jpeg_sequence'):
        charge(frames.nbytes // 3 * _FRAME)  # of the other loaders, which do not say earlier how large frames are
    return frames, metadata


def _refuse_missing_frames(loader: Any, frames: int, metadata: Mapping[str, Any]) -> None:
    if not frames:
        raise VideoError('The video has no frame that can be read.')
    if metadata['video_backend'] == 'jpeg_sequence':
        return
    fps = loader.kwargs.get('fps', -1)
    announced = (metadata['total_num_frames'], loader.num_frames, fps, metadata['duration'])
    expected, _ = loader.video_loader.smart_nframes(*announced)
    if expected - frames > max(1, _UNREADABLE * expected):
        raise VideoError(f'The video is damaged or truncated: {expected - frames} of {expected} frames cannot be read.')


class Capture:
    """An OpenCV capture that gives up where a video has ended, and resizes the frames of large ones as they are read.

    Every frame becomes one tile later on, made by the same function and so of the same pixels; until then, a second of
    4K video would take a gigabyte.

    Args:
        capture: OpenCV's.
        frames: how many are going to be kept.

    Attributes:
        memory: bytes that they are going to take.
    """

    def __init__(self, capture: Any, frames: int) -> None:
        import cv2

        self._capture = capture
        self._grabbed = self._failed = 0
        size = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT
        self._width, self._height = (max(0, int(capture.get(side))) for side in size)
        full, tile = self._width * self._height, IMAGE_SIZE * IMAGE_SIZE
        self._shrinks = full > tile and frames * full * _FRAME > _LARGE
        self._replaced = size if self._shrinks else ()
        self.memory = frames * (tile if self._shrinks else full) * _FRAME + full * _FULL_FRAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)

    def get(self, prop: int) -> float:
        """A property of the video, whose frames have the size that they are read with."""
        return float(IMAGE_SIZE) if prop in self._replaced else self._capture.get(prop)

    def grab(self) -> bool:
        """Go to the next frame; raises VideoError after too many that are not there."""
        if self._capture.grab():
            self._grabbed += 1
            self._failed = 0
            return True
        self._failed += 1
        if self._failed > max(_END, _UNREADABLE * self._grabbed):
            raise VideoError(f'The video is damaged or truncated: it ends after {self._grabbed} frames.')
        return False

    def retrieve(self) -> tuple[bool, np.ndarray | None]:
        """Whether the frame can be read, and its pixels; raises VideoError if its size is not what was counted."""
        there, frame = self._capture.retrieve()
        if not there:
            return False, None
        if frame.shape != (self._height, self._width, 3):
            raise VideoError(f'The video is damaged: not all of its frames have {self._width}x{self._height} pixels.')
        # Colours are resized one by one: that they come as blue, green and red changes nothing.
        return True, cut_tiles(Image.fromarray(frame), 1, 1)[0] if self._shrinks else frame
