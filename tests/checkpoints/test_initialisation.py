"""Random weights: the same every time, finite activations, scores that tell tiles apart."""

import pytest
import torch

from lmdeploy_vico.checkpoints.initialisation import DummyWeights, Kind, Spread, dummy_spread, kind_of, spread
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


LAYER = 'vision_model.encoder.layers.0'
KINDS = {
    f'{LAYER}.ls1': ((64,), Kind.LAYER_SCALE, Spread(0.0, 0.1)),
    f'{LAYER}.norm1.weight': ((64,), Kind.NORM, Spread(0.0, 1.0)),
    f'{LAYER}.norm1.bias': ((64,), Kind.BIAS, Spread(0.0)),
    f'{LAYER}.mlp.fc1.weight': ((256, 64), Kind.MATRIX, Spread(1 / 8)),
    'vision_model.embeddings.patch_embedding.weight': ((64, 3, 14, 14), Kind.MATRIX, Spread(588**-0.5)),
    'vision_model.embeddings.position_embedding': ((1, 1025, 64), Kind.EMBEDDING, Spread(1.0)),
    'pooling_before_gating.query_token': ((1, 64), Kind.EMBEDDING, Spread(1.0)),
    'pooling_before_gating.attn1.in_proj_bias': ((192,), Kind.BIAS, Spread(0.0)),
    'language_model.model.embed_tokens.weight': ((1024, 64), Kind.EMBEDDING, Spread(1.0)),
    'model.layers.0.mlp.experts.gate_up.weight': ((8, 256, 64), Kind.MATRIX, Spread(1 / 8)),
}


@pytest.mark.parametrize('name', KINDS)
def test_a_name_and_a_shape_say_what_a_tensor_gets(name):
    shape, kind, expected = KINDS[name]
    assert (kind_of(name, shape), spread(name, shape)) == (kind, expected)


def test_tensors_of_other_names_differ():
    module = torch.nn.ModuleList([torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)])
    DummyWeights().load_into(module)
    assert not torch.equal(module[0].weight, module[1].weight)


def test_dummies_have_embeddings_like_matrices_and_full_layer_scales():
    assert dummy_spread('model.embed_tokens.weight', (1024, 64)) == Spread(1 / 8)
    assert dummy_spread(f'{LAYER}.ls1', (64,)) == Spread(0.0, 1.0)
    assert dummy_spread(f'{LAYER}.mlp.fc1.weight', (256, 64)) == spread(f'{LAYER}.mlp.fc1.weight', (256, 64))
