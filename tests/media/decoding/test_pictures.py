"""Pictures: which pixels come out, and that half of them never do."""

import io
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media.files import FORMATS, encoded, noise, pillow
from PIL import Image, ImageFile, ImageOps

from lmdeploy_vico.media.decoding.pictures import Picture
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions

pytestmark = pytest.mark.usefixtures('strict')
PLAIN = PictureOptions(upright=False, on_white=False)


@pytest.fixture(scope='module')
def strict():
    """Pillow as it is in a process that decodes; LMDeploy, which other tests import, has it accept half pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', False)
        yield


def decode(data, options=None):
    """The pixels, ``[height, width, 3]``."""
    picture = Picture(data, options or PictureOptions())
    with tempfile.TemporaryFile() as file:
        picture.write(file.fileno())
        file.seek(0)
        width, height = picture.size
        return np.frombuffer(file.read(), np.uint8).reshape(height, width, 3)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('options', [PLAIN, PictureOptions()], ids=['LMDeploy', 'defaults'])
def test_the_pixels_are_pillows(kind, options):
    data = encoded(noise(), kind, **FORMATS[kind])
    np.testing.assert_array_equal(decode(data, options), pillow(data))


MODES = {
    'PNG': ('1', 'L', 'P', 'LA', 'RGBA'),
    'TIFF': ('1', 'L', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr'),
    'JPEG': ('L', 'CMYK', 'YCbCr'),
    'WEBP': ('L', 'RGBA'),
    'AVIF': ('L', 'RGBA'),
    'GIF': ('1', 'L', 'P', 'RGBA'),
    'BMP': ('1', 'L', 'P', 'RGBA'),
    'PPM': ('1', 'L'),
}


@pytest.mark.parametrize('kind, mode', [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_all_modes_as_lmdeploy_converts_them(kind, mode):
    data = encoded(noise().convert(mode), kind)
    np.testing.assert_array_equal(decode(data, PLAIN), pillow(data))


def test_a_picture_of_more_than_one_strip():
    data = encoded(noise(700, 900), 'PNG')
    np.testing.assert_array_equal(decode(data), pillow(data))


@pytest.mark.parametrize('size', [(1, 3000), (3000, 1), (1, 1)])
def test_narrow_pictures(size):
    data = encoded(noise(*size), 'PNG')
    np.testing.assert_array_equal(decode(data), pillow(data))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'TIFF'])
def test_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(noise(), kind, exif=exif, **FORMATS[kind])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB'))
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(decode(data, PLAIN), pillow(data))


def test_upright_by_a_chunk_at_the_end():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(noise(), 'PNG', exif=exif)
    start = data.index(b'eXIf') - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], 'big')
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    np.testing.assert_array_equal(decode(moved), decode(data))


@pytest.mark.parametrize('orientation', [0, 9, 65535])
def test_an_orientation_that_is_none(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(noise(), 'PNG', exif=exif)
    np.testing.assert_array_equal(decode(data), pillow(data))


def on_white(image):
    """By arithmetic: a share of the picture's colour, and the rest of white."""
    rgba = np.asarray(image.convert('RGBA')).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(
    'kind, mode', [('PNG', 'RGBA'), ('PNG', 'LA'), ('WEBP', 'RGBA'), ('TIFF', 'RGBA'), ('AVIF', 'RGBA')]
)
def test_transparency_on_white(kind, mode):
    image = noise().convert('RGBA')
    image.putalpha(noise(seed=4).convert('L'))
    data = encoded(image.convert(mode), kind, **FORMATS[kind])
    shown = Image.open(io.BytesIO(data))
    assert np.abs(decode(data) - on_white(shown)).max() <= 1
    np.testing.assert_array_equal(decode(data, PLAIN), pillow(data))


@pytest.mark.parametrize('mode, transparent', [('P', 0), ('L', 7), ('RGB', (10, 20, 30))])
def test_one_transparent_colour_on_white(mode, transparent):
    image = Image.new('RGB', (8, 4), (10, 20, 30)).convert(mode)
    if mode == 'L':
        image = Image.new('L', (8, 4), 7)
    image.paste(5 if mode != 'RGB' else (1, 2, 3), (0, 0, 4, 4))
    if mode == 'P':
        image = Image.fromarray(np.zeros((4, 8), np.uint8), 'L').convert('P')
    data = encoded(image, 'PNG', transparency=transparent)
    shown = Image.open(io.BytesIO(data))
    found = decode(data)
    assert np.abs(found - on_white(shown)).max() <= 1
    assert (found[:, 4:] == 255).all()  # what is transparent


def test_sixteen_bits_of_grey():
    """Each of the 256 values that a picture of eight bits has comes back; those in between are rounded."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values.astype(float) / 257).astype(np.uint8)
    for kind in ('PNG', 'TIFF', 'PPM'):
        found = decode(encoded(Image.fromarray(values), kind))
        for channel in range(3):
            np.testing.assert_array_equal(found[..., channel], expected, err_msg=kind)


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_thirty_two_bits_are_refused(mode):
    with pytest.raises(MediaError, match='values of 32 bits .* send 8 or 16 bits'):
        decode(encoded(noise().convert(mode), 'TIFF'))


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_the_first_frame_of_several(kind):
    frames = [noise(seed=seed) for seed in (1, 2)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data), pillow(data))


# --- damage ----------------------------------------------------------------------------------------------------------


def jpeg(**options):
    return encoded(noise(), 'JPEG', quality=90, **options)


@pytest.mark.parametrize(
    'options', [{}, {'progressive': True}, {'subsampling': 0}, {'restart_marker_rows': 1}], ids=str
)
@pytest.mark.parametrize('trailer', [b'', b'dhav\x59\x19\x01\0', b'\0\0\1\x0a\x0e\0\0\0Image_UTC_Data' + bytes(3000)])
def test_a_jpeg_that_lacks_only_its_end_marker(options, trailer):
    data = jpeg(**options)
    assert data.endswith(b'\xff\xd9')
    np.testing.assert_array_equal(decode(data[:-2] + trailer), pillow(data))


def test_a_grey_jpeg_without_its_end_marker():
    data = encoded(noise().convert('L'), 'JPEG')
    np.testing.assert_array_equal(decode(data[:-2]), pillow(data))


# What a process takes at most to decode standard input, in bytes beyond what it took before, and what is counted.
PEAK = """
import io, os, sys
from lmdeploy_vico.media.decoding.pictures import Picture
from lmdeploy_vico.media.options import PictureOptions
sys.path.extend(sys.argv[1:])
from media.files import encoded, noise

def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ':'))

kind, data = sys.argv[2], sys.stdin.buffer.read()
pixels = os.memfd_create('pixels')
Picture(encoded(noise(), kind), PictureOptions()).write(pixels)  # libraries are loaded
os.ftruncate(pixels, 0)
os.lseek(pixels, 0, os.SEEK_SET)
before = status('VmRSS')
picture = Picture(data, PictureOptions())
picture.write(pixels)
print(status('VmHWM') - before, picture.memory)
"""
TURNED = Image.Exif()
TURNED[0x112] = 6


@pytest.mark.parametrize(
    'kind, mode, options, end',
    [
        ('JPEG', 'RGB', {}, True),
        ('JPEG', 'RGB', {}, False),
        ('JPEG', 'RGB', {'progressive': True, 'subsampling': 0, 'exif': TURNED}, False),
        ('JPEG', 'CMYK', {'progressive': True, 'subsampling': 0}, True),
        ('JPEG', 'CMYK', {'progressive': True, 'subsampling': 0}, False),
        ('WEBP', 'RGB', {'method': 0}, True),
        ('AVIF', 'RGB', {'speed': 10, 'subsampling': '4:4:4'}, True),
        ('PNG', 'RGBA', {'compress_level': 1, 'exif': TURNED}, True),
    ],
    ids=['JPEG', 'no end', 'turned, no end', 'CMYK', 'CMYK, no end', 'WebP', 'AVIF', 'PNG'],
)
def test_no_picture_takes_more_memory_than_is_counted(kind, mode, options, end):
    data = encoded(noise(200, 200).resize((2000, 2000)).convert(mode), kind, **options)
    command = [sys.executable, '-c', PEAK, str(Path(__file__).parents[2]), kind]
    out = subprocess.run(command, input=data if end else data[:-2], capture_output=True, check=True).stdout
    peak, counted = (int(number) for number in out.split())
    assert peak <= counted


@pytest.mark.parametrize('progressive', [False, True])
def test_a_jpeg_cut_anywhere_is_whole_or_refused(progressive):
    """Of the last bytes some hold no pixel; wherever the file ends, what comes out is all of the picture."""
    data = jpeg(progressive=progressive)
    whole, refused = pillow(data), 0
    for length in [*range(len(data) - 40, len(data)), *range(0, len(data) - 40, 97)]:
        try:
            found = decode(data[:length])
        except MediaError as error:
            assert 'damaged or truncated' in str(error) or 'not an image in a format' in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(found, whole, err_msg=str(length))
            assert length > len(data) - 10
    assert refused > 35


def test_a_progressive_jpeg_that_ends_between_two_scans():
    """What is there is a whole picture, but a coarse one: decoders show it, and say nothing."""
    data = jpeg(progressive=True)
    last_scan = data.rindex(b'\xff\xda')
    with pytest.raises(MediaError, match='damaged or truncated'):
        decode(data[:last_scan])


@pytest.mark.parametrize('kind', [*FORMATS, 'progressive JPEG'])
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1))
def test_cut_anywhere(kind, share):
    name = kind.split()[-1]
    data = encoded(noise(), name, **{**FORMATS[name], **({'progressive': True} if name != kind else {})})
    try:
        found = decode(data[: int(share * len(data))])
    except MediaError as error:
        assert str(error).startswith(('The image is damaged or truncated:', 'The data is not an image'))
    else:
        np.testing.assert_array_equal(found, pillow(data))


def chunk(kind, body, good=True):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body) + (not good))


def with_chunk(data, new):
    """A PNG with a chunk after its header."""
    return data[:33] + new + data[33:]


def test_a_wrong_checksum_outside_of_the_pixels():
    data = encoded(noise(), 'PNG')
    damaged = with_chunk(with_chunk(data, chunk(b'tEXt', b'a\0b', good=False)), chunk(b'pHYs', bytes(9), good=False))
    with pytest.raises(Exception, match=r'.'):
        Image.open(io.BytesIO(damaged)).load()
    np.testing.assert_array_equal(decode(damaged), pillow(data))


def test_a_wrong_checksum_of_the_pixels():
    data = bytearray(encoded(noise(), 'PNG'))
    data[20] ^= 1  # the width, whose checksum is then wrong
    with pytest.raises(MediaError, match='damaged or truncated'):
        decode(bytes(data))


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(FORMATS)), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_changed(kind, seed):
    """Pixels, or a sentence; nothing else comes out of any file."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encoded(noise(), kind, **FORMATS[kind]), np.uint8).copy()
    places = rng.integers(0, len(data), rng.integers(1, 20))
    data[places] = rng.integers(0, 256, len(places))
    if rng.random() < 0.3:
        data[rng.integers(0, min(64, len(data)), 4)] = 255
    try:
        picture = Picture(bytes(data), PictureOptions())
        if np.prod(picture.size, dtype=float) > 10**7:
            return  # counted, and refused where there is no room
        with tempfile.TemporaryFile() as file:
            picture.write(file.fileno())
            assert file.seek(0, 2) == np.prod(picture.size) * 3
    except MediaError as error:
        assert 10 < len(str(error)) < 400
