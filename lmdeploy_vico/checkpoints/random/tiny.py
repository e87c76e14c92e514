"""Make a complete random checkpoint in the layout of InternVL3.5-Flash."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmdeploy_vico.checkpoints.random import configuration
from lmdeploy_vico.checkpoints.random.calibration import as_stored, calibrate
from lmdeploy_vico.checkpoints.random.configuration import DTYPES, LLMS, SIZES, VITS, Size
from lmdeploy_vico.checkpoints.random.limits import MADE_BY, MARKER
from lmdeploy_vico.checkpoints.random.tokenizer import VOCABULARY, write_tokenizer
from lmdeploy_vico.checkpoints.random.weights import (
    Noise,
    language_weights,
    projector_weights,
    router_weights,
    vision_weights,
)

SHARDS = 2
REMOTE_CODE = 'configuration_internvl_chat.py'


def is_tiny_checkpoint(path: str | Path) -> bool:
    """Tell whether ``path`` is a directory that :func:`make_tiny_checkpoint` wrote."""
    return (Path(path) / MARKER).is_file()


def make_tiny_checkpoint(
    path: str | Path,
    llm: str = 'dense',
    vit: str = 'layer_norm',
    seed: int = 0,
    size: str = 'tiny',
    flash: bool = True,
    force: bool = False,
    dtype: str = 'bfloat16',
) -> Path:
    """Write a random InternVL3.5-Flash checkpoint (two shards) and return its directory.

    The same arguments give the same bytes. ``llm`` is 'dense' (Qwen3) or 'moe' (Qwen3-MoE, 8 experts, 2 per token);
    ``vit`` is 'layer_norm' (InternViT-300M's layout) or 'rms_norm' (InternViT-6B's); ``size`` is 'tiny' or 'small';
    without ``flash`` it is a plain InternVL checkpoint with neither router nor second projector; ``dtype`` is
    'bfloat16', as published, or 'float32' (the same values, for an engine to compute without rounding to bfloat16).
    Raises ValueError for an unknown choice and FileExistsError when ``path`` holds anything but a tiny checkpoint,
    unless ``force`` is set. Files of the same names are overwritten, all others stay.
    """
    choices = (('llm', llm, LLMS), ('vit', vit, VITS), ('size', size, tuple(SIZES)), ('dtype', dtype, DTYPES))
    for name, value, accepted in choices:
        if value not in accepted:
            raise ValueError(f'{name} is one of {", ".join(accepted)}; got {value!r}')
    path = Path(path)
    prepare_directory(path, force)
    # First of all, so that a directory left by an interrupted run can be recognised and replaced.
    arguments = {'llm': llm, 'vit': vit, 'seed': seed, 'size': size, 'flash': flash, 'dtype': dtype}
    write_json(path / MARKER, {'made_by': MADE_BY, **arguments})
    token_ids = write_tokenizer(path)
    # As in the published vocabularies, there are more embedding rows than tokens.
    vocab_size = -(-len(token_ids) // 128) * 128
    shape = SIZES[size]
    write_configuration(path, shape, llm, vit, vocab_size, token_ids, flash, dtype)

    noise = Noise(seed)
    weights = vision_weights(shape, vit, noise) | projector_weights(shape, flash, noise)
    if flash:
        weights |= router_weights(shape, noise)
    calibrate(weights, shape)
    weights |= as_stored(language_weights(shape, llm, vocab_size, VOCABULARY, noise))
    _save(path, weights, getattr(torch, dtype))
    return path


def write_configuration(
    path: Path,
    size: Size,
    llm: str,
    vit: str,
    vocab_size: int,
    token_ids: dict[str, int],
    flash: bool = True,
    dtype: str = 'bfloat16',
    absolute_threshold: float = configuration.ABSOLUTE_THRESHOLD,
) -> None:
    """Write every file of a checkpoint that is neither weights nor tokenizer; arguments as for a tiny checkpoint.

    ``absolute_threshold`` is the score that a tile needs, whatever the others' are, to be compressed.
    """
    llm_config = configuration.llm_config(size, llm, vocab_size, token_ids)
    config = configuration.model_config(configuration.vision_config(size, vit), llm_config, flash)
    if flash:
        config['flash_absolute_threshold'] = absolute_threshold
    for part in (config, config['llm_config'], config['vision_config']):
        part['dtype'] = dtype
    write_json(path / 'config.json', config)
    shutil.copy(Path(__file__).with_name(f'_{REMOTE_CODE}'), path / REMOTE_CODE)
    write_json(path / 'generation_config.json', configuration.generation_config(token_ids))
    write_json(path / 'preprocessor_config.json', configuration.preprocessor_config())


def prepare_directory(path: Path, force: bool) -> None:
    """Make the directory. Nothing is ever removed: every tiny checkpoint has the same file names."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f'{path} is not a directory')
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not force and not is_tiny_checkpoint(path):
        raise FileExistsError(f'{path} is not empty and is not a tiny checkpoint')


def _save(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write the tensors into shards of about the same size, with their index."""
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    total = sum(tensor.nbytes for tensor in stored.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in stored.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f'model-{i + 1:05d}-of-{SHARDS:05d}.safetensors'
        save_file(shard, path / file, metadata={'format': 'pt'})
        (path / file).chmod(0o644)  # safetensors makes files that only their owner can read
        weight_map |= dict.fromkeys(shard, file)
    index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}
    write_json(path / 'model.safetensors.index.json', index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
