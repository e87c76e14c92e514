"""Which files are decoded: those of the list, and no others."""

import pytest
from media.files import FORMATS, encoded, noise
from PIL import Image

from lmdeploy_vico.media.decoding.formats import IMAGES, image_format, require_video
from lmdeploy_vico.media.errors import MediaError

HEAD = 64


@pytest.mark.parametrize('kind', FORMATS)
def test_each_format_is_known_by_its_first_bytes(kind):
    assert image_format(encoded(noise(), kind, **FORMATS[kind])[:HEAD]) == kind
    assert set(IMAGES) == set(FORMATS)


def test_pillow_knows_all_of_them():
    Image.init()
    assert set(IMAGES) <= set(Image.OPEN)


def test_what_else_pillow_writes_is_refused():
    Image.init()
    refused = []
    for kind in sorted(set(Image.SAVE) - set(FORMATS) - {'MPO', 'DIB'}):
        try:
            data = encoded(noise().convert('RGB'), kind)
        except Exception:  # it writes no RGB, or needs what is not installed
            continue
        with pytest.raises(MediaError, match='not an image in a format that can be read: PNG, JPEG, WebP'):
            image_format(data[:HEAD])
        refused.append(kind)
    assert {'EPS', 'TGA', 'ICO', 'PDF', 'PCX'} <= set(refused)


@pytest.mark.parametrize(
    'data',
    [b'', b'hello', b'%!PS-Adobe-3.0', b'SIMPLE  =', b'\x1f\x8b\x08', b'RIFF\0\0\0\0WAVE', b'<svg xmlns=',
     b'\0\0\0\x18ftypmp42'],
)  # fmt: skip
def test_other_files(data):
    with pytest.raises(MediaError, match='not an image in a format that can be read'):
        image_format(data)


MP4 = b'\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41'


@pytest.mark.parametrize(
    'data',
    [MP4, b'\0\0\0\x14ftypqt  \0\0\0\0qt  ', b'\0\0\0\x08moov', b'\x1aE\xdf\xa3' + bytes(30), b'RIFF\0\0\0\0AVI LIST',
     (b'G' + bytes(187)) * 4],
    ids=['mp4', 'mov', 'old mov', 'webm', 'avi', 'ts'],
)  # fmt: skip
def test_videos(data):
    require_video(data)


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 24900 RTP/AVP 96\n',
        b'#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/secret\n',
        b'ffconcat version 1.0\nfile /etc/passwd\n',
        b'<?xml version="1.0"?><MPD></MPD>',
        b'GIF89a' + bytes(100),
        b'RIFF\0\0\0\0WEBPVP8 ',
        b'\0\0\0\x20ftypavif\0\0\0\0avifmif1',
        b'\xff\xd8\xff\xe0',
        b'G' + bytes(187) + b'x' + bytes(400),
    ],
    ids=['nothing', 'SDP', 'HLS', 'concat', 'DASH', 'GIF', 'WebP', 'AVIF', 'JPEG', 'one sync byte'],
)
def test_what_is_no_video_never_reaches_ffmpeg(data):
    with pytest.raises(MediaError, match='not a video that can be read: MP4, MOV, WebM'):
        require_video(data)
