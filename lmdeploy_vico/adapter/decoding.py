"""Guards LMDeploy's decoding of images and videos in a process that serves a ViCO model."""

from collections.abc import Callable, Mapping
from typing import Any

import wrapt
from PIL import Image, ImageFile, UnidentifiedImageError


class ImageError(ValueError):
    """An image that cannot be decoded; LMDeploy answers 400 with the message."""


class VideoError(ValueError):
    """A video that cannot be decoded; LMDeploy answers 400 with the message."""


_LOADERS = ('load_bytes', 'load_base64', 'load_file')
# Containers may announce a few frames more than they hold; when more than this share of a video's frames cannot be
# read, and more than one, it is damaged.
_UNREADABLE = 0.1
# Frames in a row; a stream may recover from fewer.
_END = 100


def guard_media_decoding() -> None:
    """Refuse damaged pictures and videos, and say in a sentence what is wrong with those that cannot be decoded.

    Why: LMDeploy tells Pillow to accept truncated files, so half a picture would be answered as if it were whole; it
    skips the frames of a video that it cannot read, and goes on, for as many frames as the header announces, where a
    video has ended, which can take minutes; and it reports every decoding error but ValueError as "Request
    preprocessing failed." Called when a ViCO model starts, so that other processes keep LMDeploy's behaviour. Can go
    when LMDeploy rejects truncated images and videos and names the error. Idempotent.
    """
    from lmdeploy.vl.media.image import ImageMediaIO
    from lmdeploy.vl.media.video import VideoMediaIO
    from lmdeploy.vl.media.video_loader import OpenCVVideoLoader

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    for name in _LOADERS:
        _wrap(ImageMediaIO, name, _explain)
        _wrap(VideoMediaIO, name, _explain_video)
    _wrap(VideoMediaIO, '__init__', _explain_video_backend)
    _wrap(OpenCVVideoLoader, '_read_frames', _stop_at_the_end)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    if not isinstance(owner.__dict__[name], wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(owner, name, wrapper)


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


def _explain_video_backend(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
    del instance
    try:
        wrapped(*args, **kwargs)
    except ImportError as error:
        raise VideoError(
            f'This server cannot read videos until opencv-python-headless is installed on it: {error}'
        ) from error


def _explain_video(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    try:
        frames, metadata = wrapped(*args, **kwargs)
    except FileNotFoundError:
        raise VideoError('The video file does not exist.') from None
    except MemoryError:
        raise VideoError('The frames of the video are too large to be decoded; ask for fewer num_frames.') from None
    except ImageError as error:
        raise VideoError(f'A frame of the video cannot be read. {error}') from None
    except VideoError:
        raise  # load_base64 calls load_bytes
    except Exception as error:
        # The backends raise whatever their arithmetic makes of a damaged header.
        raise VideoError(f'The data is not a video that can be read, or it is damaged: {error}') from None
    _refuse_missing_frames(instance, len(frames), metadata)
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


def _stop_at_the_end(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    del instance
    capture, *others = args
    return wrapped(_Capture(capture), *others, **kwargs)


class _Capture:
    """An OpenCV capture that gives up where a video has ended, whatever its header says."""

    def __init__(self, capture: Any) -> None:
        self._capture = capture
        self._grabbed = self._failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)

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
