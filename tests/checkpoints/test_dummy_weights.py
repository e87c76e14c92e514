"""Made-up weights: the same every time, finite activations, scores that tell tiles apart."""

import pytest
import torch

from lmdeploy_vico.checkpoints.files import DummyWeights
from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.checkpoints.random.configuration import SIZES, Size
from lmdeploy_vico.checkpoints.random.published import Model
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder

# As deep as the published ViTs, since it is over the layers that activations grow.
DEEP = {
    'layer_norm': Size(64, 24, 4, 128, 128, 2, 4, 2, 32, 256, 8, 2, 128),
    'rms_norm': Size(64, 45, 4, 128, 128, 2, 4, 2, 32, 256, 8, 2, 128),
}


@pytest.fixture(params=DEEP)
def encoder(request, tmp_path):
    path = make_checkpoint_without_weights(tmp_path / 'new', Model(DEEP[request.param], vit=request.param))
    return TileEncoder.load(DummyWeights(), VicoConfig.from_pretrained(path), device='cpu')


def test_scores_tell_tiles_apart(encoder, pictures):
    images = [pictures[name] for name in ('astronaut', 'coffee', 'page')]
    encoded = VisionEncoder(encoder).encode(images, 0.5)
    assert all(one.embeddings.isfinite().all() for one in encoded)
    assert 0.01 < torch.cat([one.embeddings for one in encoded]).std() < 10
    scores = torch.tensor([score for one in encoded for score in one.scores])
    assert scores.unique().numel() == len(scores)
    assert scores.std() > 0.01


def test_same_values_every_time():
    config = SIZES['tiny']

    def filled():
        module = torch.nn.Sequential(torch.nn.Linear(config.hidden, 5), torch.nn.LayerNorm(5), torch.nn.Conv2d(3, 4, 2))
        DummyWeights().load_into(module)
        return module.state_dict()

    first, second = filled(), filled()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first['0.weight'].std() == pytest.approx(config.hidden**-0.5, rel=0.2)
    assert first['2.weight'].std() == pytest.approx(12**-0.5, rel=0.4)
    assert not first['0.bias'].any() and not first['1.bias'].any() and (first['1.weight'] == 1).all()
