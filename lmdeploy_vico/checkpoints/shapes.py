"""Name and shape of every tensor that a checkpoint has, by its config."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.checkpoints.names import (
    COMPRESSED_PROJECTOR,
    FULL_PROJECTOR,
    GATING,
    POOLING,
    POOLING_STEPS,
    VIT,
    Shape,
)
from lmdeploy_vico.config import GRID, PATCH_SIZE, InternViTConfig, is_vico

Shapes = dict[str, Shape]


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor of an unquantised checkpoint: the vision side first, then the language model.

    Args:
        config: the content of ``config.json``, of a ViCO or a plain InternVL checkpoint whose language model is a Qwen3
            or a Qwen3-MoE.
    """
    language_model = SimpleNamespace(**config['llm_config'])
    vision = InternViTConfig.from_dict(config['vision_config'])
    shapes = vision_shapes(vision, language_model.hidden_size, flash=is_vico(config))
    return shapes | language_model_shapes(language_model, SimpleNamespace(**config))


def vision_shapes(vision: InternViTConfig, llm_hidden_size: int, flash: bool = True) -> Shapes:
    """Name and shape of every tensor of the vision side, those that nothing reads (``names.UNUSED``) included.

    Args:
        vision: the InternViT's shape.
        llm_hidden_size: width of a visual token, H.
        flash: whether the checkpoint has a router and a projector of compressed tiles.
    """
    width, hidden = vision.hidden_size, llm_hidden_size
    shapes = _vit(vision)
    shapes |= _norm(f'{FULL_PROJECTOR}0', 4 * width)
    shapes |= _linear(f'{FULL_PROJECTOR}1', 4 * width, hidden)
    shapes |= _linear(f'{FULL_PROJECTOR}3', hidden, hidden)
    if flash:
        shapes |= _norm(f'{COMPRESSED_PROJECTOR}0', 16 * width)
        shapes |= _linear(f'{COMPRESSED_PROJECTOR}1', 16 * width, 2 * hidden)
        shapes |= _linear(f'{COMPRESSED_PROJECTOR}4', 2 * hidden, 2 * hidden)
        shapes |= _linear(f'{COMPRESSED_PROJECTOR}7', 2 * hidden, hidden)
        shapes |= _router(width)
    return shapes


def _vit(vision: InternViTConfig) -> Shapes:
    width = vision.hidden_size
    embeddings = f'{VIT}embeddings'
    shapes: Shapes = {
        f'{embeddings}.class_embedding': (1, 1, width),
        f'{embeddings}.position_embedding': (1, GRID * GRID + 1, width),
        f'{embeddings}.patch_embedding.weight': (width, 3, PATCH_SIZE, PATCH_SIZE),
        f'{embeddings}.patch_embedding.bias': (width,),
    }
    for index in range(vision.num_hidden_layers):
        shapes |= _vit_layer(f'{VIT}encoder.layers.{index}', vision)
    return shapes


def _vit_layer(layer: str, vision: InternViTConfig) -> Shapes:
    width, norm_has_bias = vision.hidden_size, vision.norm_type == 'layer_norm'
    shapes: Shapes = {f'{layer}.ls1': (width,), f'{layer}.ls2': (width,)}
    for norm in ('norm1', 'norm2'):
        shapes |= _norm(f'{layer}.{norm}', width, norm_has_bias)
    shapes |= _linear(f'{layer}.attn.qkv', width, 3 * width, vision.qkv_bias)
    if vision.qk_normalization:
        for norm in ('q_norm', 'k_norm'):
            shapes |= _norm(f'{layer}.attn.{norm}', width, bias=False)
    shapes |= _linear(f'{layer}.attn.proj', width, width)
    shapes |= _linear(f'{layer}.mlp.fc1', width, vision.intermediate_size)
    return shapes | _linear(f'{layer}.mlp.fc2', vision.intermediate_size, width)


def _router(width: int) -> Shapes:
    shapes: Shapes = {f'{POOLING}query_token': (1, width)}
    for step in POOLING_STEPS:
        attention = f'{POOLING}attn{step}'
        shapes[f'{attention}.in_proj_weight'] = (3 * width, width)
        shapes[f'{attention}.in_proj_bias'] = (3 * width,)
        shapes |= _linear(f'{attention}.out_proj', width, width)
        shapes |= _norm(f'{POOLING}norm{step}', width)
    for block in range(1, 5):
        shapes |= _linear(f'{GATING}block{block}.0', width, 4 * width)
        shapes |= _linear(f'{GATING}block{block}.3', 4 * width, width)
        shapes |= _norm(f'{GATING}block{block}.5', width)
    return shapes | _norm(f'{GATING}gate.0', width) | _linear(f'{GATING}gate.1', width, 2)


def _linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Shapes:
    return {f'{name}.weight': (n_out, n_in)} | ({f'{name}.bias': (n_out,)} if bias else {})


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f'{name}.weight': (width,)}
    return shapes | ({f'{name}.bias': (width,)} if bias else {})
