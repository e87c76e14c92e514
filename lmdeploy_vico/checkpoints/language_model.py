"""The tensors that the language model of a checkpoint must have, so that a missing one stops the start by name.

LMDeploy loads whatever the files hold and leaves all other parameters uninitialised.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL, Shape
from lmdeploy_vico.checkpoints.safetensors_format import FLOATS
from lmdeploy_vico.checkpoints.skipped_modules import SkippedModules

_ARCHITECTURES = ('Qwen3ForCausalLM', 'Qwen3MoeForCausalLM')
FP8_BLOCK = 128  # rows and columns that share a scale; LMDeploy supports no other size, whatever the config says
# How the names of quantised modules end. Norms are not quantised, nor does LMDeploy quantise the experts' gate.
_QUANTISABLE = '_proj'


def language_model_shapes(config: Any, checkpoint_config: Any) -> dict[str, Shape]:
    """Return name and shape of every unquantised tensor of a Qwen3 or Qwen3-MoE language model.

    Args:
        config: the language model's Hugging Face config.
        checkpoint_config: the whole checkpoint's, which may carry the quantisation.

    Returns:
        Shapes by name; empty for other architectures.
    """
    plain, _ = _modules(config, checkpoint_config)
    return {f'{name}.weight': shape for name, shape in plain.items()}


def quantised_shapes(config: Any, checkpoint_config: Any, dtypes: Mapping[str, str]) -> dict[str, Shape]:
    """Return name and shape of the tensors that such a language model has in place of its quantised weights.

    Args:
        config: as for :func:`language_model_shapes`.
        checkpoint_config: likewise.
        dtypes: of the checkpoint's tensors. A weight that an FP8 checkpoint stores unquantised needs no scales, since
            LMDeploy quantises it itself.

    Returns:
        Shapes by name; empty for methods other than AWQ, FP8 with a scale per block, and compressed-tensors of 4 bits.
    """
    _, modules = _modules(config, checkpoint_config)
    quantisation = _quantization_config(config, checkpoint_config)
    shapes: dict[str, Shape] = {}
    for name, (rows, columns) in modules.items():
        stored = _quantised_shapes(quantisation, rows, columns)
        if dtypes.get(f'{name}.weight') in FLOATS:
            stored.pop('weight_scale_inv', None)
        shapes |= {f'{name}.{kind}': shape for kind, shape in stored.items()}
    return shapes


def _quantised_shapes(quantisation: Mapping[str, Any], rows: int, columns: int) -> dict[str, Shape]:
    match quantisation['quant_method']:
        case 'awq':
            packed, groups = rows * quantisation.get('bits', 4) // 32, columns // quantisation.get('group_size', 128)
            return {'qweight': (columns, packed), 'qzeros': (groups, packed), 'scales': (groups, rows)}
        case 'compressed-tensors':
            return {'weight_packed': (rows, columns // 8), 'weight_scale': (rows, columns // 32), 'weight_shape': (2,)}
        case 'fp8' if quantisation.get('activation_scheme') != 'static' or quantisation.get('weight_block_size'):
            blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            return {'weight': (rows, columns), 'weight_scale_inv': blocks}
    return {}


def _modules(config: Any, checkpoint_config: Any) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return a language model's modules with the shape of their weight: the unquantised, and the quantised."""
    if config.architectures[0] not in _ARCHITECTURES:
        return {}, {}
    modules: dict[str, Shape] = {'model.embed_tokens': (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        mlp = _moe_shapes(config) if _is_moe(config, index) else _mlp_shapes(config)
        layer = _attention_shapes(config) | mlp | _norm_shapes(config)
        modules |= {f'model.layers.{index}.{name}': shape for name, shape in layer.items()}
    modules['model.norm'] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        modules['lm_head'] = (config.vocab_size, config.hidden_size)
    plain = {LANGUAGE_MODEL + name: shape for name, shape in modules.items()}
    quantisation = _quantization_config(config, checkpoint_config)
    if not quantisation:
        return plain, {}
    skipped = SkippedModules(quantisation)
    quantised = [name for name in plain if name.endswith(_QUANTISABLE) and name not in skipped]
    return plain, {name: plain.pop(name) for name in quantised}


def fused_modules(config: Any) -> Iterator[tuple[str, str]]:
    """Iterate over the layers that LMDeploy may quantise: its own name for each, and its kind, 'linear' or 'moe'.

    Args:
        config: of a language model; one that is neither a Qwen3 nor a Qwen3-MoE has no such layers.
    """
    if config.architectures[0] not in _ARCHITECTURES:
        return
    for index in range(config.num_hidden_layers):
        layer = f'model.layers.{index}'
        yield f'{layer}.self_attn.qkv_proj', 'linear'
        yield f'{layer}.self_attn.o_proj', 'linear'
        if _is_moe(config, index):
            yield f'{layer}.mlp.experts', 'moe'
        else:
            yield f'{layer}.mlp.gate_up_proj', 'linear'
            yield f'{layer}.mlp.down_proj', 'linear'


def is_quantised(config: Any, checkpoint_config: Any) -> bool:
    """Return whether a language model is stored quantised; arguments as for :func:`language_model_shapes`."""
    return bool(_quantization_config(config, checkpoint_config))


def _quantization_config(config: Any, checkpoint_config: Any) -> Any:
    parts = (getattr(part, 'quantization_config', None) for part in (config, checkpoint_config))
    return next((found for found in parts if found), None)


def _attention_shapes(config: Any) -> dict[str, Shape]:
    width, head_dim = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        'self_attn.q_proj': (query, width),
        'self_attn.k_proj': (key, width),
        'self_attn.v_proj': (key, width),
        'self_attn.o_proj': (width, query),
        'self_attn.q_norm': (head_dim,),
        'self_attn.k_norm': (head_dim,),
    }


def _norm_shapes(config: Any) -> dict[str, Shape]:
    return {'input_layernorm': (config.hidden_size,), 'post_attention_layernorm': (config.hidden_size,)}


def _mlp_shapes(config: Any, intermediate: int | None = None, name: str = 'mlp') -> dict[str, Shape]:
    inner, width = intermediate or config.intermediate_size, config.hidden_size
    return {
        f'{name}.gate_proj': (inner, width),
        f'{name}.up_proj': (inner, width),
        f'{name}.down_proj': (width, inner),
    }


def _moe_shapes(config: Any) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {'mlp.gate': (config.num_experts, config.hidden_size)}
    for expert in range(config.num_experts):
        shapes |= _mlp_shapes(config, config.moe_intermediate_size, f'mlp.experts.{expert}')
    return shapes


def _is_moe(config: Any, layer: int) -> bool:
    if config.architectures[0] != 'Qwen3MoeForCausalLM' or layer in (config.mlp_only_layers or []):
        return False
    return config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
