"""A checkpoint's ``config.json`` as the vision side reads it, and the constants that all ViCO models share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = 'InternVLChatModel'
IMAGE_SIZE = 448  # pixels along a side of a tile
PATCH_SIZE = 14  # pixels along a side of a patch
GRID = IMAGE_SIZE // PATCH_SIZE  # patches along a side of a tile
ROUTER_HEADS = 16  # attention heads of the router's pooling, whatever the ViT's width
TOKENS_FULL = 256  # visual tokens of a full tile
TOKENS_COMPRESSED = 64  # visual tokens of a compressed tile
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class UnsupportedCheckpointError(ValueError):
    """This plugin cannot serve the checkpoint; the message says why."""


@dataclass(frozen=True)
class InternViTConfig:
    """Shape of an InternViT: 300M (``layer_norm``) or 6B (``rms_norm``, normalised q and k)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    norm_type: str
    qk_normalization: bool
    qkv_bias: bool
    layer_norm_eps: float

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> 'InternViTConfig':
        """Read a ``vision_config`` section; raises :class:`UnsupportedCheckpointError`."""
        _require(config.get('image_size', IMAGE_SIZE) == IMAGE_SIZE, 'vision_config.image_size', config, IMAGE_SIZE)
        _require(config.get('patch_size', PATCH_SIZE) == PATCH_SIZE, 'vision_config.patch_size', config, PATCH_SIZE)
        norm_type = config.get('norm_type', 'rms_norm')
        if norm_type not in ('layer_norm', 'rms_norm'):
            raise UnsupportedCheckpointError(
                f'vision_config.norm_type is {norm_type!r}; layer_norm and rms_norm are supported.'
            )
        return cls(
            hidden_size=config['hidden_size'],
            num_hidden_layers=config['num_hidden_layers'],
            num_attention_heads=config['num_attention_heads'],
            intermediate_size=config['intermediate_size'],
            norm_type=norm_type,
            qk_normalization=config.get('qk_normalization', False),
            qkv_bias=config.get('qkv_bias', False),
            layer_norm_eps=config.get('layer_norm_eps', 1e-6),
        )


@dataclass(frozen=True)
class VicoConfig:
    """The part of a ViCO checkpoint's config that the vision side depends on.

    Attributes:
        vision: the InternViT's shape.
        llm_hidden_size: width of a visual token, H.
        relative_threshold, absolute_threshold: the routing rule's two thresholds (paper, sections 3.2 and 4.5).
        min_tiles, max_tiles: bounds of the tiling, without the thumbnail.
        use_thumbnail: whether an image of several tiles gets a thumbnail tile.
    """

    vision: InternViTConfig
    llm_hidden_size: int
    relative_threshold: float
    absolute_threshold: float
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> 'VicoConfig':
        """Read a checkpoint's whole config; raises :class:`UnsupportedCheckpointError` naming the offending key."""
        if not is_vico(config):
            raise UnsupportedCheckpointError(
                'not a ViCO (InternVL3.5-Flash) checkpoint: config.json needs '
                f'architectures ["{ARCHITECTURE}"] and flash_mode.'
            )
        _require(config.get('ps_version', 'v2') == 'v2', 'ps_version', config, 'v2')
        _require(config.get('select_layer', -1) == -1, 'select_layer', config, -1)
        _require(config.get('downsample_ratio', 0.5) == 0.5, 'downsample_ratio', config, 0.5)
        _require(config.get('force_image_size') in (None, IMAGE_SIZE), 'force_image_size', config, IMAGE_SIZE)
        _require(bool(config.get('dynamic_image_size', True)), 'dynamic_image_size', config, True)
        thresholds = {}
        for name in ('flash_relative_threshold', 'flash_absolute_threshold'):
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UnsupportedCheckpointError(f'{name} is {value!r}; a number in [0, 1] is needed to route tiles.')
            thresholds[name] = float(value)
        return cls(
            vision=InternViTConfig.from_dict(config['vision_config']),
            llm_hidden_size=config['llm_config']['hidden_size'],
            relative_threshold=thresholds['flash_relative_threshold'],
            absolute_threshold=thresholds['flash_absolute_threshold'],
            min_tiles=config.get('min_dynamic_patch', 1),
            max_tiles=config.get('max_dynamic_patch', 12),
            use_thumbnail=config.get('use_thumbnail', True),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> 'VicoConfig':
        """Read ``config.json`` of the checkpoint directory ``path``."""
        return cls.from_dict(json.loads((Path(path) / 'config.json').read_text()))


def is_vico(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a ViCO checkpoint, rather than a plain InternVL or any other model."""
    architectures = config.get('architectures') or []
    return ARCHITECTURE in architectures and bool(config.get('flash_mode'))


def _require(holds: bool, key: str, config: Mapping[str, Any], supported: object) -> None:
    if not holds:
        value = config.get(key.rpartition('.')[2])
        raise UnsupportedCheckpointError(f'{key} is {value!r} in config.json; only {supported!r} is supported.')
