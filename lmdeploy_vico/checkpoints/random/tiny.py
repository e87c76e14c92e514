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
from lmdeploy_vico.checkpoints.random.configuration import DTYPES, LLMS, SIZES, VITS
from lmdeploy_vico.checkpoints.random.limits import MADE_BY, MARKER
from lmdeploy_vico.checkpoints.random.tokenizer import VOCABULARY, write_tokenizer
from lmdeploy_vico.checkpoints.random.weights import Noise, language_weights, vision_weights
from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE, index_text, shard_names
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.config import InternViTConfig

SHARDS = 2
REMOTE_CODE = 'configuration_internvl_chat.py'


def is_tiny_checkpoint(path: str | Path) -> bool:
    """Return whether ``path`` is a directory that this package wrote a random checkpoint into."""
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

    The same arguments give the same bytes. Files of the same names are overwritten, all others stay.

    Args:
        path: the directory.
        llm: 'dense' (Qwen3) or 'moe' (Qwen3-MoE, 8 experts, 2 per token).
        vit: 'layer_norm' (InternViT-300M's layout) or 'rms_norm' (InternViT-6B's).
        seed: of the weights.
        size: 'tiny' or 'small'.
        flash: False makes a plain InternVL checkpoint, without a router and a second projector.
        force: write into a directory that holds something else.
        dtype: 'bfloat16', as published, or 'float32': the same values, with which an engine computes in float32.

    Raises:
        ValueError: a choice is unknown.
        FileExistsError: ``path`` holds anything but a random checkpoint, and ``force`` is not set.
    """
    choices = (('llm', llm, LLMS), ('vit', vit, VITS), ('size', size, tuple(SIZES)), ('dtype', dtype, DTYPES))
    for name, value, accepted in choices:
        if value not in accepted:
            raise ValueError(f'{name} is one of {", ".join(accepted)}; got {value!r}')
    path = Path(path)
    prepare_directory(path, force)
    # First, so that a directory left by an interrupted run can be recognised and replaced.
    arguments = {'llm': llm, 'vit': vit, 'seed': seed, 'size': size, 'flash': flash, 'dtype': dtype}
    write_json(path / MARKER, {'made_by': MADE_BY, **arguments})
    token_ids = write_tokenizer(path)
    # As in the published vocabularies, there are more embedding rows than tokens.
    vocab_size = -(-len(token_ids) // 128) * 128
    config = configuration.checkpoint_config(SIZES[size], llm, vit, vocab_size, token_ids, flash, dtype)
    write_configuration(path, config, token_ids)

    shapes, noise = checkpoint_shapes(config), Noise(seed)
    weights = vision_weights(shapes, noise)
    calibrate(weights, InternViTConfig.from_dict(config['vision_config']))
    weights |= as_stored(language_weights(shapes, config['llm_config'], VOCABULARY, noise))
    save_weights(path, weights, getattr(torch, dtype))
    return path


def write_configuration(path: Path, config: dict[str, Any], token_ids: dict[str, int]) -> None:
    """Write every file of a checkpoint that is neither weights nor tokenizer.

    Args:
        path: the directory.
        config: the content of ``config.json``, of :func:`configuration.checkpoint_config`.
        token_ids: the id of every special token.
    """
    write_json(path / 'config.json', config)
    copy_remote_code(path)
    write_json(path / 'generation_config.json', configuration.generation_config(token_ids))
    write_json(path / 'preprocessor_config.json', configuration.preprocessor_config())


def copy_remote_code(path: Path) -> None:
    """Write the module that ``auto_map`` of a config names."""
    shutil.copyfile(Path(__file__).with_name(f'_{REMOTE_CODE}'), path / REMOTE_CODE)


def prepare_directory(path: Path, force: bool) -> None:
    """Make the directory, or check that it may be written into. Nothing in it is removed.

    Raises:
        FileExistsError: it holds anything but a random checkpoint, and ``force`` is not set.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f'{path} is not a directory')
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not force and not is_tiny_checkpoint(path):
        raise FileExistsError(f'{path} is not empty and is not a tiny checkpoint')


def save_weights(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write the tensors into files of about the same size, and their index."""
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    total = sum(tensor.nbytes for tensor in stored.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in stored.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = tensor
        written += tensor.nbytes
    files: dict[str, str] = {}
    for file, shard in zip(shard_names(SHARDS), shards, strict=True):
        save_file(shard, path / file, metadata={'format': 'pt'})
        (path / file).chmod(0o644)  # safetensors makes files that only their owner can read
        files |= dict.fromkeys(shard, file)
    (path / INDEX_FILE).write_text(index_text(files, total), encoding='utf-8')


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
