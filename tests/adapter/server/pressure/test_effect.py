"""How many tiles of a prompt are compressed because of pressure, and no others."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lmdeploy_vico.adapter.server.pressure.effect import pressed_tiles
from lmdeploy_vico.adapter.server.request import VicoRequest
from lmdeploy_vico.adapter.server.synthetic import SyntheticEncoder, SyntheticImage, under_pressure
from lmdeploy_vico.choices import Pressed
from lmdeploy_vico.stage.jobs import EncodedImage, ImageJob, routing_groups
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import route_prompt
from lmdeploy_vico.vision.tiling import Grid

THRESHOLDS = (0.5, 0.5)
PICTURE = Image.new('RGB', (1, 1))


def encoded(jobs, compression, seed):
    """The jobs' images as a stage would give them back, by random scores."""
    counts = [job.tiles for job in jobs]
    scores = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed))
    digests = [bytes([number]) for number in range(len(scores))]
    chosen = route_prompt(scores, digests, counts, routing_groups(jobs, compression), *THRESHOLDS)
    tokens = [64 if compressed else 256 for compressed in chosen.tolist()]
    images, begin = [], 0
    for count in counts:
        of_image = slice(begin, begin + count)
        images.append(EncodedImage(VisualTokens(None, tokens[of_image], scores[of_image].tolist()), digests[of_image]))
        begin += count
    return images


def compressed(images):
    return [tokens == 64 for image in images for tokens in image.tokens.tile_tokens]


@pytest.mark.parametrize('base', ['auto', 'none', 0.3, 'all'])
@pytest.mark.parametrize('own', [None, 'none', 'auto'])
@pytest.mark.parametrize('seed', range(5))
def test_pictures(base, own, seed):
    jobs = [ImageJob(PICTURE, Grid(3, 3, True)), ImageJob(PICTURE, Grid(2, 2, True), own)]
    calm = encoded(jobs, base, seed)
    pressed = encoded(jobs, Pressed(base, 0.25), seed)
    request = VicoRequest((), Pressed(base, 0.25), None, jobs=(jobs,))
    assert pressed_tiles(replace(request, compression=base), calm, THRESHOLDS) == 0
    further = [now and not before for before, now in zip(compressed(calm), compressed(pressed), strict=True)]
    assert all(now or not before for before, now in zip(compressed(calm), compressed(pressed), strict=True))
    assert pressed_tiles(request, pressed, THRESHOLDS) == sum(further)
    pressed_by_prompt = 15 if own is None else 10
    room = pressed_by_prompt - sum(compressed(calm)[:pressed_by_prompt])
    assert sum(further) == min(room, pressed_by_prompt // 4)
    assert own is None or not any(further[10:])  # it states its own


@pytest.mark.parametrize('tiles, extra, now', [(10, 0.25, 2), (10, 0.5, 5), (1, 0.5, 0), (4, 1, 4)])
def test_synthetic_images_that_leave_it_to_the_server(tiles, extra, now):
    encoder = SyntheticEncoder(8, torch.float32, 13)
    compression = Pressed('auto', extra)
    image = SyntheticImage(tiles, 0, seed=1, stated=False)
    changed = under_pressure(image, compression)
    assert changed == replace(image, compressed=now)
    assert under_pressure(image, 'auto') is image
    request = VicoRequest((), compression, None, jobs=([image],))
    assert pressed_tiles(request, [encoder.encode(changed)], THRESHOLDS) == now


@pytest.mark.parametrize('asked', [0, 5, 10])
def test_synthetic_images_that_state_their_compression(asked):
    compression = Pressed('auto', 0.5)
    image = SyntheticImage(10, asked, seed=1)
    assert under_pressure(image, compression) is image
    request = VicoRequest((), compression, None, jobs=([image],))
    assert pressed_tiles(request, [SyntheticEncoder(8, torch.float32, 13).encode(image)], THRESHOLDS) == 0
