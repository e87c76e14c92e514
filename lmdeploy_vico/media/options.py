"""What is asked of decoded pictures and videos, and of what decodes them. Imports nothing heavy."""

import os
from dataclasses import dataclass

MOST_PROCESSES = 16


def default_processes() -> int:
    """As many as there are cores, but two, so that one file never holds up all others, and at most 16."""
    return max(2, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class PictureOptions:
    """How a picture becomes RGB.

    Attributes:
        upright: whether it is turned as its EXIF orientation says.
        on_white: whether transparent parts show white; otherwise transparency is dropped, as Pillow's ``convert`` does.
    """

    upright: bool = True
    on_white: bool = True


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video are taken.

    Attributes:
        num_frames: at most so many, evenly spaced; -1 for all.
        fps: at most so many of a second; None for any number.
        tile_side: pixels to which the frames of large videos are shrunk while they are read.
    """

    num_frames: int = 32
    fps: float | None = None
    tile_side: int = 448
