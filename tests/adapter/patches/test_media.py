"""A damaged picture or video is refused or decoded whole; never half."""

import asyncio
import base64
import io
import struct
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from adapter.server.counting import counting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmdeploy.serve.processors.multimodal import MultimodalProcessor
from lmdeploy.vl.media.image import ImageMediaIO
from lmdeploy.vl.media.video import VideoMediaIO
from lmdeploy.vl.media.video_loader import OpenCVVideoLoader
from parity.conversations import data_url
from parity.videos import moving_crops, write_video
from PIL import Image, ImageFile

from lmdeploy_vico.adapter.patches import media
from lmdeploy_vico.adapter.server import decoding
from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.media import AT_ONCE, MediaParser
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.adapter.server.served import PixelBudget, TooLargeError
from lmdeploy_vico.patching import Register, Trigger
from lmdeploy_vico.vision.tiling import Tiling, cut_tiles

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """The patches, for this module's tests only."""
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    for name in ('load_bytes', 'load_base64', 'load_file'):
        monkeypatch.setattr(ImageMediaIO, name, ImageMediaIO.__dict__[name])
    for name in ('__init__', 'load_bytes', 'load_base64', 'load_file'):
        monkeypatch.setattr(VideoMediaIO, name, VideoMediaIO.__dict__[name])
    for owner, name in ((OpenCVVideoLoader, '_read_frames'), (ImageFile.ImageFile, 'load_prepare')):
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    register = Register()
    register.install(media.PATCHES)
    register.apply(Trigger.MODEL)
    return register


def encoded(kind, progressive=False):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({'progressive': True} if progressive else {}))
    return buffer.getvalue()


def decode(data):
    return np.asarray(ImageMediaIO().load_base64('image/png', data))


@pytest.mark.parametrize('kind', FORMATS)
def test_whole_pictures_pass(kind):
    data = encoded(kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    np.testing.assert_array_equal(decode(base64.b64encode(data).decode()), expected)


@pytest.mark.parametrize('kind', [*FORMATS, 'progressive JPEG'])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_base64_cut_anywhere(kind, share):
    data = encoded(kind.split()[-1], progressive=kind.startswith('progressive'))
    text = base64.b64encode(data).decode()
    whole = decode(text)
    cut = text[: int(share * len(text))]
    try:
        result = decode(cut)
    except ValueError as error:
        assert str(error).startswith(('The image is damaged or truncated:', 'The data is not an image'))
    else:
        np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_the_last_quarter_missing_is_refused(kind):
    data = encoded(kind)
    with pytest.raises(ValueError, match='damaged or truncated'):
        ImageMediaIO().load_bytes(data[: len(data) * 3 // 4])


@pytest.mark.parametrize('data', [b'', b'hello', b'\x89PNG\r\n\x1a\n'])
def test_not_an_image(data):
    with pytest.raises(ValueError, match='not an image in a format that can be read|damaged'):
        ImageMediaIO().load_bytes(data)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='The image is too large'):
        ImageMediaIO().load_bytes(encoded('PNG'))


def test_no_memory(monkeypatch):
    def convert(*args):
        raise MemoryError

    monkeypatch.setattr(Image.Image, 'convert', convert)
    with pytest.raises(ValueError, match='The image is too large to be decoded: the memory does not suffice'):
        ImageMediaIO().load_bytes(encoded('PNG'))


def test_a_bad_mode_is_reported_once():
    with pytest.raises(ValueError) as caught:
        ImageMediaIO(image_mode='XX').load_base64('', base64.b64encode(encoded('PNG')).decode())
    assert str(caught.value).count('damaged') == 1


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
        ImageMediaIO().load_file(tmp_path / 'nothing.png')


def test_guarding_twice_changes_nothing(guarded):
    def guards():
        owners = {ImageMediaIO: 'load_bytes', VideoMediaIO: '__init__', OpenCVVideoLoader: '_read_frames'}
        return [id(owner.__dict__[name]) for owner, name in owners.items()]

    before = guards()
    guarded.install(media.PATCHES)
    guarded.apply(Trigger.MODEL)
    assert guards() == before


# --- memory ----------------------------------------------------------------------------------------------------------


def icon_with_a_larger_picture():
    """16x16 pixels, says its header; the PNG in it has 40x56."""
    png = encoded('PNG')
    return b'\0\0\1\0\1\0' + bytes([16, 16, 0, 0, 1, 0, 24, 0]) + struct.pack('<II', len(png), 22) + png


@pytest.mark.parametrize('kind', [*FORMATS, 'ICO'])
@pytest.mark.parametrize('load', ['load_bytes', 'load_base64', 'load_file'])
def test_pictures_are_counted_before_they_are_decoded(kind, load, tmp_path):
    data = icon_with_a_larger_picture() if kind == 'ICO' else encoded(kind)
    (tmp_path / 'picture').write_bytes(data)
    argument = {'load_bytes': [data], 'load_base64': ['', base64.b64encode(data)], 'load_file': [tmp_path / 'picture']}
    size, budget = 40 * 56 * 8, PixelBudget(40 * 56 * 8)
    with counting(budget):
        getattr(ImageMediaIO(), load)(*argument[load])
        assert budget.taken == size
    budget.limit = size - 1
    with pytest.raises(TooLargeError, match=f'at least {size} bytes'), counting(budget):
        getattr(ImageMediaIO(), load)(*argument[load])


@pytest.mark.busy
def test_of_pictures_that_do_not_fit_hardly_any_is_decoded(monkeypatch):
    """However many there are: refusing a request of two hundred decodes as many as refusing one of a few.

    A thread that is about to begin when the request is refused finds it over, and its memory free again.
    """
    decoded, load = {}, ImageFile.ImageFile.load

    def counted(picture):
        pixels = load(picture)
        decoded[id(picture)] = picture  # kept, so that no other has its id
        return pixels

    async def run():
        item = {'type': 'image_url', 'image_url': {'url': data_url(Image.new('RGB', (40, 56)))}}
        messages = [{'role': 'user', 'content': [item] * 200}]
        with counting(PixelBudget(4 * 40 * 56 * 8)):
            await MediaParser(MultimodalProcessor)(parse_request(messages, None, None, Rules(Tiling(1, 12), 12)))

    monkeypatch.setattr(ImageFile.ImageFile, 'load', counted)
    with pytest.raises(TooLargeError):
        asyncio.run(run())
    assert 4 <= len(decoded) <= 4 + AT_ONCE


def test_a_picture_that_does_not_fit_beside_others():
    budget = PixelBudget(40 * 56 * 8)
    with counting(budget) as other:
        other.take(1)
        with pytest.raises(OverloadError), counting(budget):
            ImageMediaIO().load_bytes(encoded('PNG'))


@pytest.fixture(scope='module')
def large_video(pictures, tmp_path_factory):
    """Ten frames of 640x480."""
    path = tmp_path_factory.mktemp('video') / 'large.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 8, (640, 480))
    for frame in moving_crops(pictures['coffee'], 10):
        writer.write(cv2.resize(frame, (640, 480)))
    writer.release()
    return path.read_bytes()


def test_frames_of_large_videos_become_the_same_tiles(large_video, monkeypatch):
    whole, of_whole = read(large_video, num_frames=5)
    monkeypatch.setattr(decoding, '_LARGE', 5 * 640 * 480 * 7 - 1)
    small, of_small = read(large_video, num_frames=5)
    assert whole.shape == (5, 480, 640, 3) and small.shape == (5, 448, 448, 3) and of_whole == of_small
    for frame, tile in zip(whole, small, strict=True):
        expected = cut_tiles(Image.fromarray(frame), 1, 1)
        np.testing.assert_array_equal(expected[0], tile)
        np.testing.assert_array_equal(expected, cut_tiles(Image.fromarray(tile), 1, 1))


@pytest.mark.parametrize('large, side', [(10**9, (640, 480)), (0, (448, 448))])
def test_frames_are_counted_before_they_are_read(large_video, monkeypatch, large, side):
    monkeypatch.setattr(decoding, '_LARGE', large)
    size = 5 * side[0] * side[1] * 7 + 640 * 480 * 16
    budget = PixelBudget(size)
    with counting(budget):
        read(large_video, num_frames=5)
        assert budget.taken == size
    budget.limit -= 1
    monkeypatch.setattr(decoding.Capture, 'grab', None)
    with pytest.raises(TooLargeError, match=f'at least {size} bytes'), counting(budget):
        read(large_video, num_frames=5)


def test_frames_of_another_size_than_announced():
    capture = decoding.Capture(cv2.VideoCapture(), 1)
    capture._capture = SimpleNamespace(retrieve=lambda: (True, np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match='The video is damaged: not all of its frames have 0x0 pixels'):
        capture.retrieve()


def test_a_sequence_of_jpeg_frames_is_counted(pictures):
    frames = sequence(moving_crops(pictures['coffee'], 4))
    budget = PixelBudget(4 * 96 * 128 * 8)
    with counting(budget):
        VideoMediaIO(ImageMediaIO()).load_base64('video/jpeg', frames)
        assert budget.taken == budget.limit
    budget.limit -= 1
    with pytest.raises(TooLargeError), counting(budget):
        VideoMediaIO(ImageMediaIO()).load_base64('video/jpeg', frames)


def test_frames_of_another_loader_are_counted(video, monkeypatch):
    loader = VideoMediaIO(ImageMediaIO(), num_frames=2)
    decoded = torch.zeros((2, 3, 96, 128), dtype=torch.uint8), {'video_backend': 'torchcodec', 'total_num_frames': 2}
    decoded[1]['duration'] = 1
    monkeypatch.setattr(loader.video_loader, 'load_bytes', lambda *args, **kwargs: decoded)
    budget = PixelBudget(2 * 96 * 128 * 7)
    with counting(budget):
        loader.load_bytes(video)
        assert budget.taken == budget.limit


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def video(pictures, tmp_path_factory):
    """Motion JPEG, which can be read up to where it was cut."""
    path = tmp_path_factory.mktemp('video') / 'coffee.avi'
    return write_video(path, moving_crops(pictures['coffee'], 40), 'MJPG').read_bytes()


def read(data, **options):
    return VideoMediaIO(ImageMediaIO(), **options).load_base64('video/mp4', base64.b64encode(data).decode())


def sequence(frames):
    return ','.join(data_url(Image.fromarray(frame), 'JPEG').partition(',')[2] for frame in frames)


def test_a_whole_video_passes(video):
    frames, metadata = read(video, num_frames=16)
    assert frames.shape == (16, 96, 128, 3) and metadata['total_num_frames'] == 40


@pytest.mark.parametrize('share', [0, 0.001, 0.3, 0.6])
def test_a_video_cut_anywhere_is_refused(video, share):
    with pytest.raises(ValueError, match='not a video that can be read, or it is damaged|frames cannot be read'):
        read(video[: int(share * len(video))], num_frames=-1)


def test_the_last_frame_missing_is_no_damage(video):
    frames, _ = read(video[: int(0.96 * len(video))], num_frames=20)
    assert len(frames) == 19


def test_a_header_that_announces_a_million_frames(video):
    data = bytearray(video)
    for chunk, offset in ((b'avih', 24), (b'strh', 40)):
        start = data.find(chunk) + offset
        assert data[start : start + 4] == (40).to_bytes(4, 'little')
        data[start : start + 4] = (10**6).to_bytes(4, 'little')
    with pytest.raises(ValueError, match='damaged or truncated: it ends after 40 frames'):
        read(bytes(data), num_frames=8)


@pytest.mark.parametrize('data', [b'', b'hello, this is text', bytes(5000)])
def test_not_a_video(data):
    with pytest.raises(ValueError, match='The data is not a video that can be read, or it is damaged'):
        read(data)


def test_a_picture_in_place_of_a_video():
    with pytest.raises(ValueError, match='The data is not a video that can be read'):
        read(encoded('JPEG'))


def test_no_readable_frame(video, monkeypatch):
    loader = VideoMediaIO(ImageMediaIO())
    nothing = np.empty((0, 96, 128, 3), np.uint8), {'total_num_frames': 0, 'video_backend': 'opencv', 'duration': 0}
    monkeypatch.setattr(loader.video_loader, 'load_bytes', lambda *args, **kwargs: nothing)
    with pytest.raises(ValueError, match='The video has no frame that can be read'):
        loader.load_bytes(video)


def test_frames_that_need_too_much_memory(video, monkeypatch):
    loader = VideoMediaIO(ImageMediaIO())

    def allocate(*args, **kwargs):
        return np.empty((2**45, 2**10), np.uint8)

    monkeypatch.setattr(loader.video_loader, 'load_bytes', allocate)
    with pytest.raises(ValueError, match='too large to be decoded; ask for fewer num_frames'):
        loader.load_bytes(video)


def test_missing_video_file(tmp_path):
    with pytest.raises(ValueError, match='The video file does not exist'):
        VideoMediaIO(ImageMediaIO()).load_file(tmp_path / 'nothing.mp4')


def test_a_sequence_of_jpeg_frames(pictures):
    frames = moving_crops(pictures['coffee'], 4)
    loader = VideoMediaIO(ImageMediaIO())
    assert loader.load_base64('video/jpeg', sequence(frames))[0].shape == (4, 96, 128, 3)
    with pytest.raises(ValueError, match='A frame of the video cannot be read. The image is damaged'):
        loader.load_base64('video/jpeg', sequence(frames)[:-2000])
    with pytest.raises(ValueError, match='A frame of the video cannot be read. The data is not an image'):
        loader.load_base64('video/jpeg', sequence(frames) + ',')
    with pytest.raises(ValueError, match='must have the same shape'):
        loader.load_base64('video/jpeg', sequence([*frames, frames[0][:50]]))


def test_no_video_backend(monkeypatch):
    for name in ('cv2', 'decord', 'torchcodec', 'torchvision'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match='until opencv-python-headless is installed'):
        VideoMediaIO(ImageMediaIO())
    monkeypatch.setenv('LMDEPLOY_VIDEO_BACKEND', 'decord')
    with pytest.raises(ValueError, match='until opencv-python-headless is installed'):
        VideoMediaIO(ImageMediaIO())
