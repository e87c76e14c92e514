"""The configuration files of random checkpoints: the published ones, with other numbers in them."""

from typing import Any

from lmdeploy_vico.checkpoints.sizes import Model, Size
from lmdeploy_vico.config import ARCHITECTURE, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, PATCH_SIZE

RELATIVE_THRESHOLD = 0.5
ABSOLUTE_THRESHOLD = 0.5


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
        'image_size': IMAGE_SIZE,
        'initializer_factor': 1.0,
        'initializer_range': 0.02,
        'intermediate_size': size.vit_mlp,
        'layer_norm_eps': 1e-06,
        'model_type': 'intern_vit_6b',
        'norm_type': vit,
        'num_attention_heads': size.vit_heads,
        'num_channels': 3,
        'num_hidden_layers': size.vit_layers,
        'patch_size': PATCH_SIZE,
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
        'architectures': [ARCHITECTURE],
        'auto_map': {
            'AutoConfig': 'configuration_internvl_chat.InternVLChatConfig',
            'AutoModel': 'modeling_internvl_chat.InternVLChatModel',
            'AutoModelForCausalLM': 'modeling_internvl_chat.InternVLChatModel',
        },
        'downsample_ratio': 0.5,
        'dtype': 'bfloat16',
        'dynamic_image_size': True,
        'eos_token_id': llm['eos_token_id'],
        'force_image_size': IMAGE_SIZE,
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


def checkpoint_config(
    size: Size,
    llm: str,
    vit: str,
    vocab_size: int,
    token_ids: dict[str, int],
    flash: bool = True,
    dtype: str = 'bfloat16',
    absolute_threshold: float = ABSOLUTE_THRESHOLD,
) -> dict[str, Any]:
    """Return the whole ``config.json`` of a checkpoint.

    Args:
        size: the model's dimensions.
        llm: one of :data:`LLMS`.
        vit: one of :data:`VITS`.
        vocab_size: rows of the token embedding.
        token_ids: the id of every special token.
        flash: whether the checkpoint is a ViCO one.
        dtype: one of :data:`DTYPES`.
        absolute_threshold: the score that a tile needs to be compressed, whatever the other tiles' scores are.
    """
    config = model_config(vision_config(size, vit), llm_config(size, llm, vocab_size, token_ids), flash)
    if flash:
        config['flash_absolute_threshold'] = absolute_threshold
    for part in (config, config['llm_config'], config['vision_config']):
        part['dtype'] = dtype
    return config


def published_config(model: Model, token_ids: dict[str, int]) -> dict[str, Any]:
    """Return the whole ``config.json`` of a checkpoint with a published model's dimensions."""
    # Random weights score all tiles about alike, on either side of a fixed threshold. With a threshold of 0, half of
    # the tiles of any prompt are compressed.
    return checkpoint_config(model.size, model.llm, model.vit, model.vocab_size, token_ids, absolute_threshold=0.0)


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
        'crop_size': IMAGE_SIZE,
        'do_center_crop': True,
        'do_normalize': True,
        'do_resize': True,
        'feature_extractor_type': 'CLIPFeatureExtractor',
        'image_mean': list(IMAGE_MEAN),
        'image_std': list(IMAGE_STD),
        'resample': 3,
        'size': IMAGE_SIZE,
    }
