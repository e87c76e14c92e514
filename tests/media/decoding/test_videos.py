"""Videos: the frames that LMDeploy takes, and what is refused."""

import subprocess
import sys
import tempfile

import numpy as np
import pytest
from lmdeploy.vl.media.video_loader import OpenCVVideoLoader
from media.files import encoded, noise
from parity.videos import moving_crops, write_video
from PIL import Image

from lmdeploy_vico.media.decoding import videos
from lmdeploy_vico.media.decoding.videos import Video, sampled
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import VideoOptions
from lmdeploy_vico.vision.tiling import cut_tiles

SIDE = 448


@pytest.fixture(scope='module', params=['avi', 'mp4', 'mkv'])
def video(request, pictures, tmp_path_factory):
    """Motion JPEG, which can be read up to where it was cut, or MPEG-4."""
    path = tmp_path_factory.mktemp('video') / f'coffee.{request.param}'
    codec = 'MJPG' if request.param == 'avi' else 'mp4v'
    return write_video(path, moving_crops(pictures['coffee'], 40), codec).read_bytes()


@pytest.fixture(scope='module')
def avi(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'coffee.avi'
    return write_video(path, moving_crops(pictures['coffee'], 40), 'MJPG').read_bytes()


def read(data, **options):
    """The frames, ``[n, height, width, 3]``."""
    found = Video(data, VideoOptions(**options))
    with tempfile.TemporaryFile() as file:
        count = found.write(file.fileno())
        file.seek(0)
        width, height = found.size
        return np.frombuffer(file.read(), np.uint8).reshape(count, height, width, 3)


@pytest.mark.parametrize(
    'options', [{}, {'num_frames': 5}, {'num_frames': -1}, {'fps': 2}, {'num_frames': 7, 'fps': 1}]
)
def test_the_frames_are_lmdeploys(video, options):
    theirs, metadata = OpenCVVideoLoader.load_bytes(video, **{'num_frames': 32, **options})
    found = read(video, **options)
    assert len(found) == len(metadata['frames_indices'])
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize('fps', [-1, 0.3, 1, 7, 100])
@pytest.mark.parametrize('num_frames', [-1, 1, 2, 9, 10, 11, 1000])
def test_sampled_as_lmdeploy_samples(num_frames, fps):
    assert sampled(10, num_frames, fps, 3.3) == OpenCVVideoLoader.smart_nframes(10, num_frames, fps, 3.3)[1]


@pytest.mark.parametrize('share', [0.001, 0.3, 0.6])
def test_a_video_cut_anywhere_is_refused(avi, share):
    with pytest.raises(MediaError, match='not a video that can be read|frames cannot be read|damaged'):
        read(avi[: int(share * len(avi))], num_frames=-1)


def test_the_last_frame_missing_is_no_damage(avi):
    assert len(read(avi[: int(0.96 * len(avi))], num_frames=20)) == 19


def test_a_header_that_announces_a_million_frames(avi):
    data = bytearray(avi)
    for chunk, offset in ((b'avih', 24), (b'strh', 40)):
        start = data.find(chunk) + offset
        assert data[start : start + 4] == (40).to_bytes(4, 'little')
        data[start : start + 4] = (10**6).to_bytes(4, 'little')
    with pytest.raises(MediaError, match='damaged or truncated: it ends after 40 frames'):
        read(bytes(data), num_frames=8)


@pytest.mark.parametrize('data', [b'', b'hello, this is text', bytes(5000), encoded(noise(), 'JPEG')])
def test_not_a_video(data):
    with pytest.raises(MediaError, match='The data is not a video that can be read'):
        read(data)


def test_ffmpegs_own_list_refuses_what_ours_lets_through():
    """A file may look like a container to us and like something else to FFmpeg, which looks at more of it."""
    sdp = 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 24900 RTP/AVP 96\n'
    program = (
        'import sys; from lmdeploy_vico.media.decoding import videos; videos.prepare(); '
        'videos.require_video = lambda data: None\n'
        'from lmdeploy_vico.media.options import VideoOptions\n'
        'try: videos.Video(sys.stdin.buffer.read(), VideoOptions())\n'
        'except Exception as error: print(error)\n'
    )
    done = subprocess.run([sys.executable, '-c', program], input=sdp.encode(), capture_output=True, timeout=60)
    assert b'not a video that can be read, or it is damaged' in done.stdout, done


@pytest.fixture(scope='module')
def large_video(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'large.avi'
    picture = pictures['coffee'].resize((640, 480))
    return write_video(path, [np.roll(np.asarray(picture), 9 * i, 1) for i in range(6)], 'MJPG').read_bytes()


def test_frames_of_large_videos_become_the_same_tiles(large_video, monkeypatch):
    whole = read(large_video)
    assert whole.shape == (6, 480, 640, 3)
    monkeypatch.setattr(videos, 'LARGE', 0)
    small = read(large_video)
    assert small.shape == (6, SIDE, SIDE, 3)
    for frame, tile in zip(whole, small, strict=True):
        np.testing.assert_array_equal(cut_tiles(Image.fromarray(frame), 1, 1)[0], tile)


def test_memory_is_known_before_frames_are_read(large_video, monkeypatch):
    assert Video(large_video, VideoOptions()).memory == 6 * 640 * 480 * 7 + 640 * 480 * 16
    monkeypatch.setattr(videos, 'LARGE', 0)
    assert Video(large_video, VideoOptions()).memory == 6 * SIDE * SIDE * 7 + 640 * 480 * 16


def test_no_opencv(avi, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    with pytest.raises(MediaError, match='opencv-python-headless is not installed'):
        read(avi)
