"""The first lesson: bands, losses, and a few steps that learn."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from lmdeploy_vico.config import InternViTConfig
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.reader.documents.codes import KEYS, Split
from lmdeploy_vico.reader.documents.page import make_tile
from lmdeploy_vico.reader.documents.print import FINE, MEDIUM
from lmdeploy_vico.reader.documents.tile import with_noise
from lmdeploy_vico.reader.initial import begin_vision
from lmdeploy_vico.reader.lessons.seeing import (
    CLASSES,
    Plan,
    Seeing,
    agreement,
    crowded_tile,
    loss_of,
    teach_seeing,
)
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel


@pytest.fixture(autouse=True)
def torch_kernels():
    use('torch')


def vit(seed=0):
    torch.manual_seed(seed)
    model = InternVisionModel(InternViTConfig(64, 4, 2, 192, 'layer_norm', False, True, 1e-6))
    begin_vision(model)
    return model


def labelled(kinds, seed=0):
    rng = np.random.default_rng(seed)
    tiles = [make_tile(rng, kind, KEYS, Split.TRAIN) for kind in kinds]
    pixels = torch.from_numpy(np.stack([with_noise(rng, tile.pixels) for tile in tiles]))
    return pixels, {
        name: torch.from_numpy(np.stack([tile.labels[name] for tile in tiles])).flatten() for name in CLASSES
    }


def test_one_band_of_all_rows_is_the_vit():
    model = vit()
    lesson = Seeing(model)
    pixels, _ = labelled(['fine'])
    with torch.no_grad():
        logits = lesson(pixels, 32)
        expected = lesson.heads['glyph'](lesson.norm(model(pixels)[:, 1:])).flatten(0, 1)
    assert torch.allclose(logits['glyph'], expected, atol=1e-5)
    assert {name: tuple(each.shape) for name, each in logits.items() if name != 'early'} == {
        name: (1024, count) for name, count in CLASSES.items()
    }


def test_a_band_sees_nothing_of_the_others():
    lesson = Seeing(vit())
    pixels, _ = labelled(['photo'])
    other = pixels.clone()
    other[:, 8 * 14 :] = 0
    with torch.no_grad():
        whole, cut = lesson(pixels, 8)['glyph'].view(32, 32, -1), lesson(other, 8)['glyph'].view(32, 32, -1)
    assert torch.allclose(whole[:8], cut[:8], atol=1e-5) and not torch.allclose(whole[8:], cut[8:], atol=1e-3)


def test_what_shows_nothing_weighs_little():
    """The loss of right logits is lower, and a class that no patch shows adds only its blanks."""
    _, labels = labelled(['fine', 'shape'])
    right = {name: 20.0 * torch.nn.functional.one_hot(labels[name], count).float() for name, count in CLASSES.items()}
    right['early'] = right['glyph']
    blank = {name: torch.zeros_like(each) for name, each in right.items()}
    assert loss_of(right, labels) < 1e-3 < loss_of(blank, labels)
    shares = agreement(right, labels, ['fine', 'shape'])
    assert shares == {
        'fine/glyph': 1, 'fine/key': 1, 'fine/place': 1, 'shape/shape': 1, 'shape/colour': 1,
    }  # fmt: skip


@pytest.mark.parametrize('size', [FINE, MEDIUM])
def test_a_crowded_tile_has_many_entries_anywhere(size):
    rng = np.random.default_rng(1)
    crowded = crowded_tile(rng, size)
    listed = make_tile(rng, size.kind, KEYS, Split.TRAIN)
    assert len(crowded.entries) > len(listed.entries)
    assert len({entry.columns.start for entry in crowded.entries}) > 3


def test_a_few_steps_learn():
    torch.manual_seed(0)
    lesson = Seeing(vit())
    pixels, labels = labelled(['fine', 'medium'], 5)
    with torch.no_grad():
        before = loss_of(lesson(pixels, 8), labels)
    output = io.StringIO()
    teach_seeing(lesson, Plan(12, 1), 1000, Console(file=output, width=300))
    with torch.no_grad():
        after = loss_of(lesson(pixels, 8), labels)
    assert after < before - 0.3
    [line] = output.getvalue().splitlines()
    assert line.startswith('seeing: step 13 of 13') and 'fine/glyph' in line
