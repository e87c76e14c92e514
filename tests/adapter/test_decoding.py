"""A damaged picture is refused or decoded whole; never half."""

import base64
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmdeploy.vl.media.image import ImageMediaIO
from PIL import Image, ImageFile

from lmdeploy_vico.adapter.decoding import guard_image_decoding

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """The guard, for this module's tests only."""
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    for name in ('load_bytes', 'load_base64', 'load_file'):
        monkeypatch.setattr(ImageMediaIO, name, ImageMediaIO.__dict__[name])
    guard_image_decoding()


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


def test_a_bad_mode_is_reported_once():
    with pytest.raises(ValueError) as caught:
        ImageMediaIO(image_mode='XX').load_base64('', base64.b64encode(encoded('PNG')).decode())
    assert str(caught.value).count('damaged') == 1


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
        ImageMediaIO().load_file(tmp_path / 'nothing.png')


def test_guarding_twice_changes_nothing():
    before = ImageMediaIO.__dict__['load_bytes']
    guard_image_decoding()
    assert ImageMediaIO.__dict__['load_bytes'] is before
