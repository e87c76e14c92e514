"""The shapes that are written down for the vision side are those of the modules that load it."""

import pytest
import torch

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.checkpoints.names import FLASH, LANGUAGE_MODEL, UNUSED, VISION
from lmdeploy_vico.checkpoints.random.configuration import SIZES, VITS
from lmdeploy_vico.checkpoints.random.published import MODELS, Model, tensor_shapes
from lmdeploy_vico.checkpoints.shapes import vision_shapes
from lmdeploy_vico.config import InternViTConfig, VicoConfig
from lmdeploy_vico.vision.model.tower import VisionTower

TINY = {f'{size} {vit}': Model(SIZES[size], vit=vit, vocab_size=2048) for size in SIZES for vit in VITS}


def internvit(model: Model, **changes) -> InternViTConfig:
    size, large = model.size, model.vit == 'rms_norm'
    values = {
        'hidden_size': size.vit_width,
        'num_hidden_layers': size.vit_layers,
        'num_attention_heads': size.vit_heads,
        'intermediate_size': size.vit_mlp,
        'norm_type': model.vit,
        'qk_normalization': large,
        'qkv_bias': not large,
        'layer_norm_eps': 1e-6,
    }
    return InternViTConfig(**values | changes)


def of_tower(vision: InternViTConfig, llm_hidden_size: int) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):
        tower = VisionTower(VicoConfig(vision, llm_hidden_size, 0.5, 0.5))
    return {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def without_unused(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(UNUSED)}


@pytest.mark.parametrize('name', [*TINY, *MODELS])
def test_the_tower_has_the_same_tensors(name):
    model = (TINY | MODELS)[name]
    expected = of_tower(internvit(model), model.size.hidden)
    assert without_unused(vision_shapes(internvit(model), model.size.hidden)) == expected
    stored = tensor_shapes(model)
    assert without_unused({k: v for k, v in stored.items() if not k.startswith(LANGUAGE_MODEL)}) == expected


@pytest.mark.parametrize('qk_normalization', [True, False])
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('norm_type', VITS)
def test_every_setting_counts_by_itself(norm_type, qkv_bias, qk_normalization):
    changes = {'norm_type': norm_type, 'qkv_bias': qkv_bias, 'qk_normalization': qk_normalization}
    vision = internvit(TINY['tiny layer_norm'], **changes)
    assert without_unused(vision_shapes(vision, 128)) == of_tower(vision, 128)


@pytest.mark.parametrize('flash', [True, False])
def test_every_name_belongs_to_one_side(make_checkpoint, flash):
    names = set(Checkpoint(make_checkpoint(flash=flash)).shapes)
    vision = {name for name in names if name.startswith(VISION)}
    language = {name for name in names if name.startswith(LANGUAGE_MODEL)}
    assert vision | language == names and not vision & language
    found = {prefix for prefix in (*VISION, *UNUSED) if any(name.startswith(prefix) for name in names)}
    assert found == ({*VISION, *UNUSED} if flash else {*VISION} - {*FLASH})
