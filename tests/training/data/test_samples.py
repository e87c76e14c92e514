"""Samples and batches, against the independent implementation's prompts."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from parity.prompts import Picture, chat_segments
from parity.reference import Reference
from PIL import Image
from training.made import TILES, gpt, human, samples_of, write_lines

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.media.decoding.pictures import Header
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.records import DataError, Records
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.data.tokens import load_tokenizer

END = '<|im_end|>'


@pytest.fixture(scope='module')
def reference(make_checkpoint):
    return Reference(make_checkpoint(dtype='float32'))


def pictures_of(data, *names):
    return [Image.open(data.parent / name) for name in names]


def user(*content):
    parts = [
        {'type': 'text', 'text': c} if isinstance(c, str) else {'type': 'image_url', 'image_url': c} for c in content
    ]
    return {'role': 'user', 'content': parts}


def test_prompts_are_those_that_are_served(dense, data, reference):
    """The way in which an ordinary client asks: a picture, then the question."""
    [cup] = pictures_of(data, 'cup.png')
    sample = dense.samples[0]
    batch = lay_out([sample], [np.zeros(1, bool)])
    expected = reference.prompt_ids(chat_segments([user({'url': cup}, 'What is it?')]), 'none')
    prompt = int(np.argmax(batch.predicts[0].numpy())) + 1
    assert prompt == len(expected)
    ours = batch.ids[0, :prompt].tolist()
    assert [token or reference.image_token for token in ours] == expected
    assert batch.visual[0].sum() == 256
    answer = reference.tokenizer.encode('A cup of coffee.' + END, add_special_tokens=False).ids
    assert batch.ids[0, prompt:].tolist() == answer
    assert batch.responses.tolist() == [len(answer)]


def test_tiles_are_those_that_are_served(dense, data, reference):
    for index, names in enumerate([['cup.png'], ['wide.png'], ['cup.png', 'wide.png'], []]):
        sample = dense.samples[index]
        tiles = [reference.tile(picture) for picture in pictures_of(data, *names)]
        assert sample.counts == [len(each) for each in tiles]
        if tiles:
            np.testing.assert_array_equal(sample.tiles, np.concatenate(tiles))
        assert dense.samples.tiles_of(index) == len(sample.tiles) == TILES[index]


def test_all_turns_of_an_assistant_are_responses(dense, reference):
    sample = dense.samples[2]
    batch = lay_out([sample], [np.zeros(4, bool)])
    following = np.append(batch.ids[0, 1:].numpy(), 0)
    spoken = following[batch.predicts[0].numpy()].tolist()
    assert reference.tokenizer.decode(spoken, skip_special_tokens=False) == f'The first.{END}Yes.{END}'


def test_compressed_tiles_take_less_room(dense):
    sample = dense.samples[2]
    chosen = np.array([True, False, True, False])
    batch = lay_out([sample], [chosen])
    assert batch.visual.sum() == 2 * 64 + 2 * 256
    assert batch.compressed.tolist() == chosen.tolist()
    first = np.flatnonzero(batch.visual[0].numpy())
    assert (np.diff(first) > 1).sum() == 1, 'one gap: between the two pictures'
    assert np.flatnonzero(np.diff(first) > 1)[0] == 64 - 1, 'the first picture is its one, compressed, tile'


def test_samples_are_padded_to_the_longest(dense):
    samples = [dense.samples[3], dense.samples[0]]
    together = lay_out(samples, [np.zeros(0, bool), np.zeros(1, bool)])
    for row, sample in enumerate(samples):
        alone = lay_out([sample], [np.zeros(len(sample.tiles), bool)])
        length = alone.ids.shape[1]
        assert together.ids[row, :length].tolist() == alone.ids[0].tolist()
        assert not together.predicts[row, length:].any() and not together.visual[row, length:].any()


def test_orientation_and_transparency_are_as_served(dense, data, tmp_path):
    pixels = np.zeros((300, 200, 4), np.uint8)
    pixels[:150, :, 3] = 255
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / 'turned.png', exif=exif)
    path = write_lines(tmp_path / 'a.jsonl', [{'image': 'turned.png', 'conversations': [human('?'), gpt('!')]}])
    config = VicoConfig.from_dict(dense.config | {'max_dynamic_patch': 1})
    tile = samples_of(path, dense.path, config)[0].tiles[0]
    assert (tile[:, :100] == 255).all(), 'the transparent half is white, and to the left once it is turned'
    assert (tile[:, -100:] == 0).all()


@pytest.mark.parametrize(
    'limits, said',
    [
        ({'max_tiles': 3}, 'the images have 4 tiles, and at most 3 are taken'),
        ({'max_length': 1000}, '1024 of them visual, and at most 1000 are taken'),
    ],
)
def test_what_is_too_large_is_named(dense, data, limits, said):
    samples = samples_of(data, dense.path, VicoConfig.from_dict(dense.config), **limits)
    for look in (samples.tiles_of, samples.__getitem__):
        with pytest.raises(DataError) as error:
            look(2)
        assert str(error.value).startswith(f'{data}, line 3: ') and said in str(error.value)


def test_a_damaged_image_is_named(dense, data, tmp_path):
    (tmp_path / 'cup.png').write_bytes((data.parent / 'cup.png').read_bytes()[:2000])
    path = write_lines(tmp_path / 'a.jsonl', [{'image': 'cup.png', 'conversations': [human('?'), gpt('!')]}])
    samples = samples_of(path, dense.path, VicoConfig.from_dict(dense.config))
    with pytest.raises(DataError, match=r'a\.jsonl, line 1: the image .*cup\.png cannot be read'):
        samples[0]


def exif_at_the_end(data):
    """A PNG whose orientation stands behind its pixels."""
    exif = Image.Exif()
    exif[274] = 6
    content = b'eXIf' + exif.tobytes().removeprefix(b'Exif\0\0')
    chunk = struct.pack('>I', len(content) - 4) + content + struct.pack('>I', zlib.crc32(content))
    return data[:-12] + chunk + data[-12:]


@pytest.mark.parametrize('name', ['photo.jpg', 'photo.png', 'photo.tiff', 'late.png'])
def test_checking_a_sample_reads_no_pixels(dense, tmp_path, rng, name):
    """Only headers are read, and the grid is that of the picture as it stands."""
    image, exif = Image.fromarray(rng.integers(0, 256, (500, 1000, 3), np.uint8)), Image.Exif()
    exif[274] = 6
    image.save(tmp_path / name, **({} if name == 'late.png' else {'exif': exif}))
    if name == 'late.png':
        (tmp_path / name).write_bytes(exif_at_the_end((tmp_path / name).read_bytes()))
    path = write_lines(tmp_path / 'a.jsonl', [{'image': name, 'conversations': [human('?'), gpt('!')]}])
    samples = samples_of(path, dense.path, VicoConfig.from_dict(dense.config))
    samples.tiles_of(0)  # what is imported or kept for the first one does not count
    tracemalloc.start()
    try:
        tiles = samples.tiles_of(0)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 0.6 * (tmp_path / name).stat().st_size
    assert tiles == samples[0].counts[0]
    with (tmp_path / name).open('rb') as file:
        assert Header(file, PictureOptions()).size == (500, 1000), 'it stands'


def test_a_header_that_is_damaged_is_named_alike(dense, data, tmp_path):
    (tmp_path / 'cup.png').write_bytes((data.parent / 'cup.png').read_bytes()[:20])
    path = write_lines(tmp_path / 'a.jsonl', [{'image': 'cup.png', 'conversations': [human('?'), gpt('!')]}])
    samples = samples_of(path, dense.path, VicoConfig.from_dict(dense.config))
    said = []
    for look in (samples.tiles_of, samples.__getitem__):
        with pytest.raises(DataError, match=r'a\.jsonl, line 1: the image .*cup\.png cannot be read') as error:
            look(0)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_template_that_rewrites_history_is_refused(dense, data):
    tokenizer = load_tokenizer(dense.path)
    tokenizer.chat_template = '{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}'
    samples = Samples(Records(data), tokenizer, VicoConfig.from_dict(dense.config), 128, 32768)
    with pytest.raises(DataError, match='line 3: the chat template renders a turn otherwise'):
        samples[2]


def test_the_independent_prompt_has_the_place_of_each_picture(dense, data, reference):
    """``<image>`` inside a sentence stands where LMDeploy's placeholder would."""
    cup, wide = pictures_of(data, 'cup.png', 'wide.png')
    segments = ['<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\n', Picture(cup), ' or ', Picture(wide)]
    segments.append('?<|im_end|>\n<|im_start|>assistant\n')
    expected = reference.prompt_ids(segments, 'none')
    batch = lay_out([dense.samples[2]], [np.zeros(4, bool)])
    ours = [token or reference.image_token for token in batch.ids[0, : len(expected)].tolist()]
    assert ours == expected
