"""Cutting an image into tiles, against LMDeploy's preprocessing of the same image in the same run.

Both are given a decoded 1500x1500 picture (nine tiles and a thumbnail) and use one thread. LMDeploy's result is
float32, the plugin's is uint8, normalised on the device. Read the ratio of the two rows, not the absolute figures.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from lmdeploy_vico.config import IMAGE_MEAN, IMAGE_STD
from lmdeploy_vico.vision.tiling import cut_tiles


@pytest.fixture(scope='module', params=['smooth', 'noisy'])
def image(request):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    if request.param == 'noisy':
        return Image.fromarray(pixels)
    return Image.fromarray(pixels[:12, :12]).resize((1500, 1500), Image.Resampling.BICUBIC)


@pytest.fixture(scope='module')
def lmdeploy_preprocess():
    from types import SimpleNamespace

    from lmdeploy.vl.model.internvl import InternVLVisionModel

    model = InternVLVisionModel.__new__(InternVLVisionModel)
    model.model_path = ''
    model.hf_config = SimpleNamespace(
        dynamic_image_size=True,
        force_image_size=448,
        downsample_ratio=0.5,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        use_thumbnail=True,
        vision_config=SimpleNamespace(image_size=448, patch_size=14),
    )
    model.build_preprocessor()
    return lambda image: model.processor(image, {})


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_same_pixels(image, lmdeploy_preprocess):
    tiles = torch.from_numpy(cut_tiles(image, 1, 12)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGE_MEAN, IMAGE_STD))
    torch.testing.assert_close((tiles - mean) / std, lmdeploy_preprocess(image), rtol=0, atol=1e-6)


@pytest.mark.benchmark(group='prepare a 1500x1500 image')
def test_lmdeploy(benchmark, image, lmdeploy_preprocess):
    benchmark(lmdeploy_preprocess, image)


@pytest.mark.benchmark(group='prepare a 1500x1500 image')
def test_plugin(benchmark, image):
    benchmark(cut_tiles, image, 1, 12)
