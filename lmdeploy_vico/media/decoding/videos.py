"""Decodes the frames of one video with OpenCV. Runs in a process of its own, which may be ended at any time.

Frames are sampled as LMDeploy 0.18 samples them with OpenCV, so that they are the same ones.
"""

import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from lmdeploy_vico.media.decoding.formats import FFMPEG_FORMATS, require_video
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import VideoOptions

# Containers may announce a few frames more than they hold; when more than this share of a video's frames cannot be
# read, and more than one, it is damaged.
UNREADABLE = 0.1
# Frames in a row; a stream may recover from fewer.
END = 100
# Bytes of a pixel of each frame: three as RGB, four as Pillow keeps it.
FRAME = 7
# One frame at a time is there in full size: OpenCV's, Pillow's, and what resizing takes.
FULL_FRAME = 16
# Videos that would take more bytes are resized frame by frame. Others later, which is quicker: by several threads.
LARGE = 2**28


def prepare() -> None:
    """Set FFmpeg up, before OpenCV is imported: no other formats than ours, whatever a file names."""
    os.environ['OPENCV_FFMPEG_CAPTURE_OPTIONS'] = f'format_whitelist;{FFMPEG_FORMATS}'
    os.environ['OPENCV_LOG_LEVEL'] = 'OFF'
    os.environ['OPENCV_FFMPEG_LOGLEVEL'] = '-8'


class Video:
    """A video whose header has been read.

    Args:
        data: the file.

    Raises:
        MediaError: it is not a video that can be read.

    Attributes:
        size: width and height of the frames as they will be handed out.
        count: of the frames that are taken.
        memory: bytes that they are going to take.
    """

    def __init__(self, data: bytes, options: VideoOptions) -> None:
        require_video(data)
        self._options = options
        self._capture = _open(data)
        import cv2

        total = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        duration = total / rate if rate > 0 else 0.0
        width, height = (
            max(0, int(self._capture.get(side))) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if total < 1 or not width or not height or not math.isfinite(duration):
            raise MediaError('The video has no frame that can be read, or it is damaged.')
        self._wanted = sampled(total, options.num_frames, options.fps or -1, duration)
        self.count = len(self._wanted)
        self._full = width, height
        full, tile = width * height, options.tile_side**2
        self._shrinks = full > tile and self.count * full * FRAME > LARGE
        self.size = (options.tile_side, options.tile_side) if self._shrinks else self._full
        self.memory = self.count * (tile if self._shrinks else full) * FRAME + full * FULL_FRAME

    def write(self, file: int) -> int:
        """Decode, and write the frames' RGB bytes ``[n, height, width, 3]`` to a file descriptor; return n.

        Raises:
            MediaError: the file is damaged: too many frames are missing.
        """
        wanted, grabbed, failed, written = set(self._wanted), 0, 0, 0
        for index in range(self._wanted[-1] + 1):
            if not self._capture.grab():
                failed += 1
                if failed > max(END, UNREADABLE * grabbed):
                    raise MediaError(f'The video is damaged or truncated: it ends after {grabbed} frames.')
                continue
            grabbed, failed = grabbed + 1, 0
            if index in wanted and self._write_frame(file):
                written += 1
        if not written:
            raise MediaError('The video has no frame that can be read.')
        missing = self.count - written
        if missing > max(1, UNREADABLE * self.count):
            raise MediaError(f'The video is damaged or truncated: {missing} of {self.count} frames cannot be read.')
        return written

    def _write_frame(self, file: int) -> bool:
        import cv2

        there, frame = self._capture.retrieve()
        if not there:
            return False
        if frame.shape != (*self._full[::-1], 3):
            raise MediaError('The video is damaged: not all of its frames have the same size.')
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if self._shrinks:
            # As the frame would be resized to its one tile later.
            frame = np.asarray(Image.fromarray(frame).resize(self.size, Image.Resampling.BICUBIC))
        view = memoryview(np.ascontiguousarray(frame).data).cast('B')
        while view:
            view = view[os.write(file, view) :]
        return True


def sampled(total: int, num_frames: int, fps: float, duration: float) -> list[int]:
    """Which frames of a video are taken: all, or so many, evenly spaced."""
    count = min(num_frames, total) if num_frames > 0 else total
    if fps > 0:
        count = min(count, math.floor(duration * fps))
    count = max(1, count)
    if count == total:
        return list(range(count))
    indices: list[int] = np.linspace(0, total - 1, count, dtype=int).tolist()
    return indices


def _open(data: bytes) -> Any:
    try:
        import cv2
        from cv2 import videoio_registry
    except ImportError as error:
        raise MediaError('This server cannot read videos: opencv-python-headless is not installed on it.') from error
    for backend in videoio_registry.getStreamBufferedBackends():
        if not videoio_registry.hasBackend(backend):
            continue
        if not videoio_registry.isBackendBuiltIn(backend):
            _, abi, api = videoio_registry.getStreamBufferedBackendPluginVersion(backend)
            if abi < 1 or (abi == 1 and api < 2):
                continue
        source: Any = io.BytesIO(data)  # OpenCV takes what can be read
        capture = cv2.VideoCapture(source, backend, [])
        if capture.isOpened():
            return capture
        break
    raise MediaError('The data is not a video that can be read, or it is damaged.')
