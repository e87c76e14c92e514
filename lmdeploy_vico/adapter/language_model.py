"""Which tensors the language model of a checkpoint must have, so that a missing one stops the start with its name.

LMDeploy loads whatever the shards hold and leaves the rest uninitialised.
"""

from typing import Any

Shape = tuple[int, ...]
PREFIX = 'language_model.'


def language_model_shapes(config: Any, checkpoint_config: Any) -> dict[str, Shape]:
    """Name and shape of every tensor of a Qwen3 or Qwen3-MoE language model.

    Args:
        config: the language model's Hugging Face config.
        checkpoint_config: the whole checkpoint's, which may carry the quantisation.

    Returns:
        Empty for other architectures and for quantised checkpoints, whose tensors LMDeploy's loaders know.
    """
    if is_quantised(config, checkpoint_config) or config.architectures[0] not in (
        'Qwen3ForCausalLM',
        'Qwen3MoeForCausalLM',
    ):
        return {}
    shapes = {
        'model.embed_tokens.weight': (config.vocab_size, config.hidden_size),
        'model.norm.weight': (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes['lm_head.weight'] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        layer = _attention_shapes(config) | (_moe_shapes(config) if _is_moe(config, index) else _mlp_shapes(config))
        shapes |= {f'model.layers.{index}.{name}.weight': shape for name, shape in layer.items()}
    return {PREFIX + name: shape for name, shape in shapes.items()}


def is_quantised(config: Any, checkpoint_config: Any) -> bool:
    """Whether a language model's weights are stored quantised; arguments as for :func:`language_model_shapes`."""
    return any(getattr(part, 'quantization_config', None) for part in (config, checkpoint_config))


def _attention_shapes(config: Any) -> dict[str, Shape]:
    width, head_dim = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        'input_layernorm': (width,),
        'post_attention_layernorm': (width,),
        'self_attn.q_proj': (query, width),
        'self_attn.k_proj': (key, width),
        'self_attn.v_proj': (key, width),
        'self_attn.o_proj': (width, query),
        'self_attn.q_norm': (head_dim,),
        'self_attn.k_norm': (head_dim,),
    }


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
