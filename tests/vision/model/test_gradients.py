"""Gradients of the vision side in plain torch, against those of the independent reference in float64."""

import numpy as np
import pytest
import torch
from parity.reference import MEAN, STD, Reference, shuffle
from torch import nn

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels import implementation
from lmdeploy_vico.vision.model.tower import VisionTower

TOLERANCE = 1e-4  # of a gradient's norm
COMPRESSED = [True, False]


@pytest.fixture(autouse=True)
def plain_torch():
    """Also in a process with Triton's interpreter: the Triton kernels have no gradients."""
    implementation.use('torch')
    yield
    implementation.use('auto')


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def path(request, make_checkpoint):
    return make_checkpoint(vit=request.param)


@pytest.fixture
def tower(path):
    tower = VisionTower(VicoConfig.from_pretrained(path))
    Checkpoint(path).load_into(tower)
    return tower


@pytest.fixture(scope='module')
def float64_reference(path):
    return Reference(path, torch.float64).vision.requires_grad_(True)


@pytest.fixture
def reference(float64_reference):
    float64_reference.zero_grad()
    return float64_reference


@pytest.fixture
def tiles(pictures):
    """Two tiles of a photograph: of noise alone the router's gradients would be all but zero."""
    pixels = np.asarray(pictures['astronaut'])[:448, :448]
    return torch.from_numpy(np.stack([pixels, pixels[::-1, ::-1]]))


def spread(values):
    """A scalar to which every value contributes differently."""
    weights = torch.linspace(-1, 1, values.numel(), dtype=values.dtype) ** 2
    return (values.flatten() * weights).sum()


def theirs(reference, tiles):
    """Patch tokens, routing probabilities, and the visual tokens of each tile, in float64."""
    pixels = (tiles.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    patches = reference.vision_model(pixels.permute(0, 3, 1, 2))
    probabilities = reference.gating(reference.pooling_before_gating(patches))
    tokens = [
        reference.mlp2(shuffle(one, 4)) if compressed else reference.mlp1(shuffle(one, 2))
        for one, compressed in zip(patches, COMPRESSED, strict=True)
    ]
    return patches, probabilities, tokens


def ours(tower, tiles, room=(1, 1)):
    patches = tower.patches(tiles)
    logits = tower.logits(patches)
    shuffled = tower.shuffle(patches, torch.tensor(COMPRESSED), room)
    tokens = [tower.project(shuffled.compressed, True)[:64], tower.project(shuffled.full, False)[:256]]
    return patches, logits.softmax(-1), tokens


LOSSES = {
    'ViT': lambda patches, probabilities, tokens: spread(patches),
    'router': lambda patches, probabilities, tokens: -probabilities.log()[range(2), [0, 1]].sum(),
    'projector of compressed tiles': lambda patches, probabilities, tokens: spread(tokens[0]),
    'projector of full tiles': lambda patches, probabilities, tokens: spread(tokens[1]),
}
# Parts of the tower that a loss reaches besides the ViT.
PARTS = {
    'ViT': (),
    'router': ('pooling_before_gating', 'gating'),
    'projector of compressed tiles': ('mlp2',),
    'projector of full tiles': ('mlp1',),
}


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_are_the_references(tower, reference, tiles, name):
    LOSSES[name](*ours(tower, tiles)).backward()
    LOSSES[name](*theirs(reference, tiles)).backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    reached = {part for part, _ in tower.named_children() if part in ('vision_model', *PARTS[name])}
    for weight_name, weight in tower.named_parameters():
        if weight_name.split('.')[0] not in reached:
            assert weight.grad is None and expected[weight_name] is None
            continue
        error = (weight.grad.double() - expected[weight_name]).norm()
        assert error <= TOLERANCE * expected[weight_name].norm(), weight_name


def test_rows_to_spare_do_not_change_gradients(tower, tiles):
    """A projector's batches have a fixed size, and rows that no tile fills."""
    grads = []
    for room in ((1, 1), (3, 3)):
        tower.zero_grad()
        _, _, tokens = ours(tower, tiles, room)
        (spread(tokens[0]) + spread(tokens[1])).backward()
        grads.append({name: weight.grad for name, weight in tower.named_parameters() if weight.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_a_step_of_training_changes_the_scores(tower, tiles):
    """Nothing that depends on the weights is kept before the tower is frozen."""
    patches = tower.patches(tiles).detach()
    for weight in (tower.pooling_before_gating.query_token, tower.pooling_before_gating.attn1.in_proj_bias):
        before = tower.logits(patches)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(tower.logits(patches), before)


def test_freezing_changes_no_bits(tower, tiles):
    with torch.inference_mode():
        live = tower.encode(tiles)
        tower.freeze()
        assert all(map(torch.equal, tower.encode(tiles), live))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_tower_requires_no_gradient(tower, tiles, dtype):
    tower.to(dtype).freeze()
    assert not tower.training
    assert not any(weight.requires_grad for weight in tower.parameters())
    assert not any(result.requires_grad for result in tower.encode(tiles[:1]))


def test_a_frozen_router_refuses_gradients(tower, tiles):
    tower.freeze()
    patches = tower.patches(tiles[:1])
    for weight in tower.pooling_before_gating.parameters():
        weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match='has been frozen and has no gradients'):
            tower.logits(patches)
        weight.requires_grad_(False)


def test_frozen_weights_let_a_gradient_through(tower, tiles):
    """To what comes before them: a frozen router still judges patch tokens that are trained."""
    patches = tower.patches(tiles).detach()
    live, frozen = patches.clone().requires_grad_(), patches.clone().requires_grad_()
    tower.logits(live).log_softmax(-1)[:, 0].sum().backward()
    tower.freeze()
    tower.logits(frozen).log_softmax(-1)[:, 0].sum().backward()
    assert torch.equal(live.grad, frozen.grad)


def test_live_bfloat16_routes_as_frozen(tower, tiles):
    tower.bfloat16()
    with torch.no_grad():
        patches = tower.patches(tiles)
        live = tower.logits(patches)
        assert live.dtype == torch.float32
        tower.freeze()
        assert torch.equal(tower.logits(patches), live)
    assert isinstance(tower.pooling_before_gating.norm1, nn.LayerNorm)
    assert tower.pooling_before_gating.norm1.weight.dtype == torch.float32
