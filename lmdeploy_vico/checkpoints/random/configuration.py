"""The configuration files of a tiny checkpoint: the published ones with small numbers in them."""

from dataclasses import dataclass
from typing import Any

TILE = 448
PATCH = 14
RELATIVE_THRESHOLD = 0.5
ABSOLUTE_THRESHOLD = 0.5


@dataclass(frozen=True)
class Size:
    """The dimensions of one preset. ``vit_width`` is a multiple of 16: the router always has 16 heads."""

    vit_width: int
    vit_layers: int
    vit_heads: int
    vit_mlp: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    experts: int
    experts_per_token: int
    expert_mlp: int


SIZES = {
    'tiny': Size(64, 2, 4, 128, 128, 2, 4, 2, 32, 256, 8, 2, 128),
    'small': Size(128, 4, 8, 256, 256, 4, 8, 4, 32, 512, 8, 2, 256),
}
LLMS = ('dense', 'moe')
VITS = ('layer_norm', 'rms_norm')
DTYPES = ('bfloat16', 'float32')


def vision_config(size: Size, vit: str) -> dict[str, Any]:
    """Return ``vision_config``: InternViT-300M's settings for 'layer_norm', InternViT-6B's for 'rms_norm'."""
    big = vit == 'rms_norm'
    return {
        'architectures': ['InternVisionModel'],
        'attention_dropout': 0.0,
        'auto_map': {
            'AutoConfig': 'configuration_intern_vit.InternVisionConfig',
            'AutoModel': 'modeling_intern_vit.InternVisionModel',
        },
        'drop_path_rate': 0.0,
        'dropout': 0.0,
        'dtype': 'bfloat16',
        'hidden_act': 'gelu',
        'hidden_size': size.vit_width,
        'image_size': TILE,
        'initializer_factor': 1.0,
        'initializer_range': 0.02,
        'intermediate_size': size.vit_mlp,
        'layer_norm_eps': 1e-06,
        'model_type': 'intern_vit_6b',
        'norm_type': vit,
        'num_attention_heads': size.vit_heads,
        'num_channels': 3,
        'num_hidden_layers': size.vit_layers,
        'patch_size': PATCH,
        'qk_normalization': big,
        'qkv_bias': not big,
        'use_flash_attn': True,
    }


def llm_config(size: Size, llm: str, vocab_size: int, token_ids: dict[str, int]) -> dict[str, Any]:
    """Return ``llm_config``: a Qwen3 or Qwen3-MoE configuration with its own ``architectures``."""
    config: dict[str, Any] = {
        'architectures': ['Qwen3ForCausalLM'],
        'attention_bias': False,
        'attention_dropout': 0.0,
        'bos_token_id': token_ids['<|endoftext|>'],
        'dtype': 'bfloat16',
        'eos_token_id': token_ids['<|im_end|>'],
        'head_dim': size.head_dim,
        'hidden_act': 'silu',
        'hidden_size': size.hidden,
        'initializer_range': 0.02,
        'intermediate_size': size.mlp,
        'max_position_embeddings': 40960,
        'max_window_layers': size.layers,
        'model_type': 'qwen3',
        'num_attention_heads': size.heads,
        'num_hidden_layers': size.layers,
        'num_key_value_heads': size.kv_heads,
        'rms_norm_eps': 1e-06,
        'rope_scaling': None,
        'rope_theta': 1000000.0,
        'sliding_window': None,
        'tie_word_embeddings': False,
        'use_cache': True,
        'use_sliding_window': False,
        'vocab_size': vocab_size,
    }
    if llm == 'moe':
        config.update(
            architectures=['Qwen3MoeForCausalLM'],
            model_type='qwen3_moe',
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=size.expert_mlp,
            norm_topk_prob=True,
            num_experts=size.experts,
            num_experts_per_tok=size.experts_per_token,
            output_router_logits=False,
            router_aux_loss_coef=0.001,
        )
    return config


def model_config(vision: dict[str, Any], llm: dict[str, Any], flash: bool) -> dict[str, Any]:
    """Return ``config.json``; of the remote code that ``auto_map`` names, only the config classes are shipped."""
    config = {
        'architectures': ['InternVLChatModel'],
        'auto_map': {
            'AutoConfig': 'configuration_internvl_chat.InternVLChatConfig',
            'AutoModel': 'modeling_internvl_chat.InternVLChatModel',
            'AutoModelForCausalLM': 'modeling_internvl_chat.InternVLChatModel',
        },
        'downsample_ratio': 0.5,
        'dtype': 'bfloat16',
        'dynamic_image_size': True,
        'eos_token_id': llm['eos_token_id'],
        'force_image_size': TILE,
        'hidden_size': llm['hidden_size'],
        'image_fold': None,
        'llm_config': llm,
        'max_dynamic_patch': 12,
        'min_dynamic_patch': 1,
        'model_type': 'internvl_chat',
        'output_attentions': False,
        'pad2square': False,
        'ps_version': 'v2',
        'select_layer': -1,
        'template': 'internvl2_5',
        'tie_word_embeddings': False,
        'use_backbone_lora': 0,
        'use_llm_lora': 0,
        'use_thumbnail': True,
        'vision_config': vision,
    }
    if flash:
        config.update(
            flash_mode=True,
            flash_relative_threshold=RELATIVE_THRESHOLD,
            flash_absolute_threshold=ABSOLUTE_THRESHOLD,
        )
    return config


def generation_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """Return ``generation_config.json``."""
    return {
        '_from_model_config': True,
        'bos_token_id': token_ids['<|endoftext|>'],
        'eos_token_id': [token_ids['<|im_end|>'], token_ids['<|endoftext|>']],
        'pad_token_id': token_ids['<|endoftext|>'],
    }


def preprocessor_config() -> dict[str, Any]:
    """Return ``preprocessor_config.json``: the image processor of a plain 448x448 resize, as published."""
    return {
        'crop_size': TILE,
        'do_center_crop': True,
        'do_normalize': True,
        'do_resize': True,
        'feature_extractor_type': 'CLIPFeatureExtractor',
        'image_mean': [0.485, 0.456, 0.406],
        'image_std': [0.229, 0.224, 0.225],
        'resample': 3,
        'size': TILE,
    }
