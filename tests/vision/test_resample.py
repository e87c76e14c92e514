"""Resizing must give Pillow's pixels, to the last bit."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from waiting import HANG

from lmdeploy_vico.vision import compiled_resize, resample
from lmdeploy_vico.vision.resample import cut, pass_order, resize_into_tiles


def picture(width, height, kind):
    rng = np.random.default_rng(width * 10007 + height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 'extreme':  # sums overshoot 0 and 255
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    return Image.fromarray(pixels)


def pillow_tiles(image, side, columns, rows):
    tiles = np.empty((columns * rows, side, side, 3), np.uint8)
    cut(np.asarray(image.resize((columns * side, rows * side))), tiles, columns)
    return tiles


def our_tiles(image, side, columns, rows):
    tiles = np.full((columns * rows, side, side, 3), 77, np.uint8)
    resize_into_tiles(image, (tiles, columns))
    return tiles


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    side=st.integers(1, 60),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    kind=st.sampled_from(['noise', 'extreme']),
)
@example(width=150, height=320, side=50, columns=2, rows=2, kind='extreme')  # columns first, by a little
@example(width=150, height=200, side=50, columns=2, rows=2, kind='extreme')  # rows first, by a little
@example(width=100, height=100, side=50, columns=2, rows=2, kind='noise')  # nothing to do
def test_same_pixels_as_pillow(width, height, side, columns, rows, kind):
    image = picture(width, height, kind)
    expected = pillow_tiles(image, side, columns, rows)
    np.testing.assert_array_equal(our_tiles(image, side, columns, rows), expected)


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 70_000),
    breadth=st.integers(1, 3),
    side=st.integers(1, 448),
    across=st.integers(1, 12),
    upright=st.booleans(),
)
@example(length=65_535, breadth=1, side=448, across=12, upright=False)  # the longest that is not left to Pillow
@example(length=65_535, breadth=1, side=448, across=12, upright=True)
@example(length=14_336, breadth=1, side=448, across=1, upright=False)  # nor this, which shrinks the furthest
@example(length=14_337, breadth=1, side=448, across=1, upright=True)
@example(length=1, breadth=1, side=448, across=12, upright=False)
def test_same_pixels_of_lines(length, breadth, side, across, upright):
    size, grid = ((breadth, length), (1, across)) if upright else ((length, breadth), (across, 1))
    image = picture(*size, 'extreme')
    np.testing.assert_array_equal(our_tiles(image, side, *grid), pillow_tiles(image, side, *grid))


def plain_weights(size, target):
    """Pillow's precompute_coeffs and normalize_coeffs_8bpc, as they are written."""
    scale = size / target
    stretch = max(scale, 1.0)
    for index in range(target):
        center = (index + 0.5) * scale
        first = max(int(center - 2.0 * stretch + 0.5), 0)
        last = min(int(center + 2.0 * stretch + 0.5), size)
        raw, total = [], 0.0
        for pixel in range(first, last):
            x = abs((pixel - center + 0.5) * (1.0 / stretch))
            near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
            raw.append(near if x < 1.0 else far if x < 2.0 else 0.0)
            total += raw[-1]  # not sum(), which is more exact than Pillow in newer Pythons
        yield first, [int(math.copysign(0.5, weight) + weight / total * (1 << 22)) for weight in raw]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 70_000), target=st.integers(1, 18_000))
@example(size=1500, target=1344)
@example(size=65_535, target=448 * 12)
@example(size=14_336, target=448)
def test_weights_are_pillows_to_the_last_bit(size, target):
    spans, fixed = compiled_resize.weights(size, target)
    for (first, count), line, (start, expected) in zip(spans, fixed, plain_weights(size, target), strict=True):
        assert (first, line[:count].tolist()) == (start, expected)
        assert not line[count:].any()


@pytest.mark.parametrize('size', [(1, 1), (3000, 40), (40, 3000), (1500, 1500), (1345, 4000)])
def test_real_sizes(size):
    image = picture(*size, 'extreme')
    for columns, rows in ((1, 1), (3, 2), (1, 5)):
        np.testing.assert_array_equal(our_tiles(image, 448, columns, rows), pillow_tiles(image, 448, columns, rows))


def test_grids_of_one_picture_are_independent():
    image = picture(300, 200, 'noise')
    together = [np.full((count, 60, 60, 3), 77, np.uint8) for count in (6, 1)]
    resize_into_tiles(image, (together[0], 3), (together[1], 1))
    np.testing.assert_array_equal(together[0], pillow_tiles(image, 60, 3, 2))
    np.testing.assert_array_equal(together[1], pillow_tiles(image, 60, 1, 1))


def test_a_picture_of_many_pixels_is_left_to_pillow(monkeypatch):
    assert pass_order() is not None
    monkeypatch.setattr(resample, 'MOST_PIXELS', 100 * 100)
    monkeypatch.setattr(compiled_resize, 'rows_first', None)
    monkeypatch.setattr(compiled_resize, 'columns_first', None)
    image = picture(101, 100, 'noise')
    np.testing.assert_array_equal(our_tiles(image, 60, 2, 1), pillow_tiles(image, 60, 2, 1))


def test_of_a_part_of_a_larger_picture():
    image = picture(300, 200, 'noise').crop((20, 30, 250, 190))
    np.testing.assert_array_equal(our_tiles(image, 60, 2, 1), pillow_tiles(image, 60, 2, 1))


def test_the_installed_pillow_is_understood():
    assert pass_order() is not None


def test_another_pillow_is_left_to_itself(monkeypatch, caplog):
    def resize(self, size):
        return Image.new('RGB', size, (1, 2, 3))

    monkeypatch.setattr(Image.Image, 'resize', resize)
    pass_order.cache_clear()
    try:
        assert set(our_tiles(picture(50, 50, 'noise'), 20, 1, 1)[0, 0, 0]) == {1, 2, 3}
        assert 'left to it' in caplog.text
    finally:
        pass_order.cache_clear()


@pytest.mark.parametrize('rule', [resample._never, resample._if_it_shrinks_far_more])
def test_either_order_of_a_pillow_is_recognised(monkeypatch, rule):
    def resize(self, size):
        pixels = np.asarray(self)
        if rule(*self.size, *size):
            return Image.fromarray(compiled_resize.columns_first(pixels, size))
        out = np.empty((size[1], size[0] * 3), np.uint8)
        return Image.fromarray(compiled_resize.rows_first(pixels, size, out).reshape(size[1], size[0], 3))

    monkeypatch.setattr(Image.Image, 'resize', resize)
    pass_order.cache_clear()
    try:
        assert pass_order() is rule
    finally:
        pass_order.cache_clear()


# In processes of their own: what has been compiled, and the most memory so far, are a process's.


def in_a_new_process(code, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=HANG, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


DIGESTS = """
import json, logging.handlers, sys
{before}
logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[handler := logging.handlers.MemoryHandler(99)])
import numpy as np
from PIL import Image
from lmdeploy_vico.vision.tiling import cut_tiles, tile_digests

rng, digests = np.random.default_rng(3), []
for width, height in [(1500, 1500), (640, 480), (400, 3000), (3000, 40), (20, 30), (1, 5000)]:
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    digests += [digest.hex() for digest in tile_digests(cut_tiles(picture, 1, 12))]
said = [record.getMessage() for record in handler.buffer if record.name == 'lmdeploy_vico.vision.resample']
print(json.dumps({{'digests': digests, 'said': said, 'numba': sys.modules.get('numba') is not None}}))
"""


BY_NUMBA, BY_PILLOW = 'Pictures are resized by compiled code', 'Pictures are resized by Pillow'


def who_resizes(given):
    return [text.partition(',')[0] for text in given['said']]


def test_without_numba_the_pixels_are_the_same_and_the_log_says_once_who_resizes():
    missing = "sys.modules['numba'] = None"
    compiled, plain = (in_a_new_process(DIGESTS.format(before=before)) for before in ('', missing))
    assert compiled['digests'] == plain['digests']
    assert (compiled['numba'], plain['numba']) == (True, False)
    assert who_resizes(compiled) == [BY_NUMBA]
    assert who_resizes(plain) == [BY_PILLOW]
    assert 'numba' in plain['said'][0]


def test_what_is_compiled_is_kept_where_a_folder_is_named_and_nowhere_else(tmp_path):
    kept = {'NUMBA_CACHE_DIR': str(tmp_path / 'kept')}
    first, second = (in_a_new_process(DIGESTS.format(before=''), **kept) for _ in range(2))
    files = [path.suffix for path in tmp_path.rglob('*.nb*')]
    assert {'.nbi', '.nbc'} == set(files)
    assert first == second
    # numba would look for a folder here, and stop the import.
    nowhere = 'import numba.core.caching as caching; caching.CacheImpl._locator_classes = []'
    not_kept = in_a_new_process(DIGESTS.format(before=nowhere), NUMBA_CACHE_DIR='')
    assert who_resizes(not_kept) == [BY_NUMBA]
    assert not_kept['digests'] == first['digests']
    assert in_a_new_process(DIGESTS.format(before=nowhere), **kept) == not_kept
    for path in tmp_path.rglob('*.nbi'):
        path.write_bytes(b'')  # as after a power failure
    damaged = in_a_new_process(DIGESTS.format(before=''), **kept)
    assert who_resizes(damaged) == [BY_PILLOW]
    assert 'Empty the folder' in damaged['said'][0]
    assert damaged['digests'] == first['digests']


COMPILED = """
import json
from PIL import Image
from lmdeploy_vico.vision import compiled_resize, resample
from lmdeploy_vico.vision.tiling import cut_tiles

functions = {name: value for name, value in vars(compiled_resize).items() if hasattr(value, 'signatures')}
count = lambda: {name: len(function.signatures) for name, function in functions.items()}
resample.pass_order()
counts = [count()]
for size in [(1500, 1500), (400, 3000), (3000, 400), (30, 20), (5000, 1), (1, 5000), (65535, 2), (1, 1)]:
    cut_tiles(Image.new('RGB', size), 1, 12)
    counts.append(count())
cut_tiles(Image.new('RGB', (900, 900)).crop((5, 5, 800, 900)), 1, 12)
counts.append(count())
print(json.dumps([counts, [name for name, function in functions.items() if function.targetoptions.get('nogil')]]))
"""


def test_trying_the_order_compiles_all_that_pictures_need():
    counts, without_gil = in_a_new_process(COMPILED)
    assert [counts[0][name] for name in ('weights', '_resize_rows', '_resize_columns')] == [1, 1, 1]
    assert set(without_gil) == set(counts[0])
    assert all(count == counts[0] for count in counts)


COST = """
import json, math, resource
from PIL import Image
from lmdeploy_vico.vision import compiled_resize, resample
from lmdeploy_vico.vision.tiling import choose_grid, cut_tiles

done = []  # multiplications of a pixel by a weight

def counted(resize):
    def run(source, spans, fixed, out, *columns):
        lines = len(source) if not columns else source.shape[1] // 3
        done.append(lines * int(spans[:, 1].sum()))
        return resize(source, spans, fixed, out, *columns)
    return run

def of_pillow(size, target):
    # Along rows, then along columns; of an enlarged picture four pixels make one.
    taps = [min(old, math.ceil(4 * max(1, old / new))) for old, new in zip(size, target)]
    return size[1] * target[0] * taps[0] + target[0] * target[1] * taps[1]

class Counted(Image.Image):
    def resize(self, size, *arguments):
        done.append(of_pillow(self.size, size))
        return super().resize(size, *arguments)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

resample.pass_order()
for name in ('_resize_rows', '_resize_columns'):
    setattr(compiled_resize, name, counted(getattr(compiled_resize, name)))
found = []
for size in [(14_336, 1), (65_535, 1), (1_000_000, 1), (1, 1_000_000)]:
    columns, rows = choose_grid(*size, 1, 12)
    targets = [(columns * 448, rows * 448), (448, 448)]
    image, before = Image.new('RGB', size), peak()
    image.__class__ = Counted
    done.clear()
    cut_tiles(image, 1, 12)
    theirs = sum(of_pillow(size, target) for target in targets)
    found.append({'size': size, 'mebibytes': peak() - before, 'ratio': sum(done) / theirs, 'passes': len(done)})
print(json.dumps(found))
"""


@pytest.mark.busy
def test_lines_cost_what_they_cost_pillow():
    found = in_a_new_process(COST)
    assert all(cost['passes'] >= 2 for cost in found), found
    assert all(0.5 < cost['ratio'] < 2 and cost['mebibytes'] < 100 for cost in found), found
