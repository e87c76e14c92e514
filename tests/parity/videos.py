"""Small videos of real pictures, written and read with OpenCV alone."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 128, 96


def moving_crops(picture: Image.Image, count: int, step: tuple[int, int] = (5, 3)) -> list[np.ndarray]:
    """A window of 128x96 that moves over a picture: ``count`` frames, uint8 ``[96, 128, 3]``, RGB."""
    pixels = np.asarray(picture.convert('RGB'))
    height, width = pixels.shape[0] - HEIGHT, pixels.shape[1] - WIDTH
    corners = [(i * step[0] % width, i * step[1] % height) for i in range(count)]
    return [pixels[top : top + HEIGHT, left : left + WIDTH] for left, top in corners]


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str = 'mp4v') -> Path:
    """Write frames at 8 a second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 8, frames[0].shape[1::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def read_video(path: Path, count: int) -> list[Image.Image]:
    """``count`` frames of a video, evenly spaced, the first and the last among them."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            break
        frames.append(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    capture.release()
    assert len(frames) >= count > 1
    return [frames[i * (len(frames) - 1) // (count - 1)] for i in range(count)]
