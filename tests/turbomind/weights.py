"""A language model of ``transformers`` with the weights that LMDeploy has committed to TurboMind, in its layout."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def language_model(root: Any) -> Qwen3ForCausalLM:
    """The model, in float32.

    Args:
        root: the stand-in's module ``text_model``: weights are ``[inputs, outputs]``, those of attention and of the MLP
            are joined, and the two halves of each head are interleaved, as TurboMind rotates them.
    """
    layers = [root.children['layers'].children[str(index)] for index in range(len(root.children['layers'].children))]
    attention, norm = layers[0].children['attention'].config, root.children['norm']
    vocabulary, hidden = root.parameters['tok_embeddings'].shape
    assert attention.rope.type == 1 and attention.rope.dim == attention.head_dim
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=layers[0].children['feed_forward'].config.inter_size,
        num_hidden_layers=len(layers),
        num_attention_heads=attention.head_num,
        num_key_value_heads=attention.kv_head_num,
        head_dim=attention.head_dim,
        rms_norm_eps=norm.config.norm_eps,
        rope_parameters={'rope_type': 'default', 'rope_theta': attention.rope.base},
        max_position_embeddings=attention.rope.max_position_embeddings,
        tie_word_embeddings=False,
    )
    weights = {
        'model.embed_tokens.weight': root.parameters['tok_embeddings'],
        'model.norm.weight': norm.parameters['weight'],
        'lm_head.weight': _linear(root, 'output'),
    }
    for index, layer in enumerate(layers):
        weights |= {f'model.layers.{index}.{name}': weight for name, weight in _layer(layer, config).items()}
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=True)
    return model


def _layer(layer: Any, config: Qwen3Config) -> dict[str, torch.Tensor]:
    attention, mlp = layer.children['attention'], layer.children['feed_forward']
    width = config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = _linear(attention, 'w_qkv').split([heads * width, kv_heads * width, kv_heads * width])
    gate, up = _linear(mlp, 'w1w3').chunk(2)
    return {
        'input_layernorm.weight': layer.children['attention_norm'].parameters['weight'],
        'post_attention_layernorm.weight': layer.children['ffn_norm'].parameters['weight'],
        'self_attn.q_proj.weight': _halves(q, width),
        'self_attn.k_proj.weight': _halves(k, width),
        'self_attn.v_proj.weight': v,
        'self_attn.o_proj.weight': _linear(attention, 'wo'),
        'self_attn.q_norm.weight': _halves(attention.children['q_norm'].parameters['weight'], width),
        'self_attn.k_norm.weight': _halves(attention.children['k_norm'].parameters['weight'], width),
        'mlp.gate_proj.weight': gate,
        'mlp.up_proj.weight': up,
        'mlp.down_proj.weight': _linear(mlp, 'w2'),
    }


def _linear(module: Any, name: str) -> torch.Tensor:
    """A weight as ``transformers`` stores it, ``[outputs, inputs]``."""
    return module.children[name].parameters['weight'].T


def _halves(weight: torch.Tensor, width: int) -> torch.Tensor:
    """The two halves of each head one after the other, of rows in which they are interleaved."""
    rows = weight.reshape(-1, width // 2, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)
