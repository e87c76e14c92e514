"""The published models' shapes, and checkpoints of them for measuring: without weights, or with random ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lmdeploy_vico.checkpoints.files import INDEX_FILE, Shape
from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.checkpoints.random import configuration, shards
from lmdeploy_vico.checkpoints.random.configuration import Size
from lmdeploy_vico.checkpoints.random.limits import MADE_BY, MARKER
from lmdeploy_vico.checkpoints.random.tiny import prepare_directory, write_configuration, write_json
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS, write_tokenizer
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.model.tower import VisionTower

VOCABULARY = 151936  # embedding rows of the published language models
WEIGHTS = ('*.safetensors', '*.safetensors.index.json')
POOLING = 'pooling_before_gating.'
# The router's third and fourth step take the second one's weights; checkpoints have some of their own, never used.
UNUSED = {f'{POOLING}{part}2.': [f'{POOLING}{part}{step}.' for step in (3, 4)] for part in ('attn', 'norm')}


class WeightsExistError(FileExistsError):
    """A directory holds weights that would not belong to the config that is to be written."""


class NoSpaceError(OSError):
    """The disk has not enough room for the weights."""


@dataclass(frozen=True)
class Model:
    """A model's shape: ``llm`` is 'dense' (Qwen3) or 'moe' (Qwen3-MoE), ``vit`` the norm of its InternViT."""

    size: Size
    llm: str = 'dense'
    vit: str = 'layer_norm'
    vocab_size: int = VOCABULARY


INTERNVIT_300M = (1024, 24, 16, 4096)
INTERNVIT_6B = (3200, 45, 25, 12800)


def _dense(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 8, 128, mlp, experts=0, experts_per_token=0, expert_mlp=0)
    return Model(size, 'dense', _vit_norm(vit))


def _moe(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int, expert_mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 4, 128, mlp, experts=128, experts_per_token=8, expert_mlp=expert_mlp)
    return Model(size, 'moe', _vit_norm(vit))


def _vit_norm(vit: tuple[int, int, int, int]) -> str:
    return 'rms_norm' if vit is INTERNVIT_6B else 'layer_norm'


# No language model has tied embeddings: the 1B is published with 1.06 billion parameters, 0.16 of them its head.
MODELS = {
    '1B': _dense(INTERNVIT_300M, 1024, 28, 16, 3072),
    '2B': _dense(INTERNVIT_300M, 2048, 28, 16, 6144),
    '4B': _dense(INTERNVIT_300M, 2560, 36, 32, 9728),
    '8B': _dense(INTERNVIT_300M, 4096, 36, 32, 12288),
    '14B': _dense(INTERNVIT_300M, 5120, 40, 40, 17408),
    '30B-A3B': _moe(INTERNVIT_300M, 2048, 48, 32, 6144, expert_mlp=768),
    '38B': _dense(INTERNVIT_6B, 5120, 64, 64, 25600),
    '241B': _moe(INTERNVIT_6B, 4096, 94, 64, 12288, expert_mlp=1536),
}


def make_checkpoint_without_weights(path: str | Path, model: str | Model, force: bool = False) -> Path:
    """Write config and tokenizer of a model, to be served with ``LMDEPLOY_VICO_DUMMY_WEIGHTS=1``; return the directory.

    The configuration has the shapes of ``model``, which is one of :data:`MODELS` if it is a name. The tokenizer is that
    of the tiny checkpoints, so that most token ids such a model generates have no text, and the routing thresholds have
    half of the tiles of any prompt compressed. Raises ValueError for an unknown name, WeightsExistError when ``path``
    holds weights, and FileExistsError when it holds anything but a tiny checkpoint, unless ``force`` is set.
    """
    path, shape = Path(path), _shape(model)
    if _holds_weights(path):
        raise WeightsExistError(f'{path} holds weights, which would not fit this config: choose another directory')
    prepare_directory(path, force)
    _write_all_but_weights(path, shape, _marker(model))
    return path


def make_checkpoint_with_weights(
    path: str | Path,
    model: str | Model,
    seed: int = 0,
    force: bool = False,
    done: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write a whole checkpoint of a model, with random bfloat16 weights that any server loads; return the directory.

    As :func:`make_checkpoint_without_weights`, and with every tensor of a published checkpoint, in shards of 4 GB. The
    same ``seed`` gives the same bytes. ``done`` is told the bytes as they are written, of :func:`weight_bytes`. A run
    that breaks off leaves shards without an index, which no server loads and the same call writes again.

    Raises:
        ValueError: the name is unknown.
        NoSpaceError: the disk has too little room for the weights; nothing has been written.
        WeightsExistError: ``path`` holds other weights, or whole ones.
        FileExistsError: as above.
    """
    path, shape = Path(path), _shape(model)
    marker = _marker(model) | {'seed': seed, 'weights': str(shape)}
    if _holds_weights(path) and not _broken_off(path, marker):
        raise WeightsExistError(f'{path} holds weights already: choose another directory')
    files = shards.plan(tensor_shapes(shape))
    _check_space(path, files)
    prepare_directory(path, force)
    _write_all_but_weights(path, shape, marker)
    shards.write(path, files, seed, done)
    return path


def weight_bytes(model: str | Model) -> int:
    """How many bytes the weights of a model are in bfloat16."""
    return shards.nbytes(tensor_shapes(_shape(model)))


def tensor_shapes(model: Model) -> dict[str, Shape]:
    """Name and shape of every tensor in a checkpoint: what the two loading sides expect, and what they leave unused."""
    no_ids = dict.fromkeys(SPECIAL_TOKENS, 0)  # shapes do not depend on the tokens
    language = configuration.llm_config(model.size, model.llm, model.vocab_size, no_ids)
    vision = configuration.vision_config(model.size, model.vit)
    config = configuration.model_config(vision, language, flash=True)
    with torch.device('meta'):
        tower = VisionTower(VicoConfig.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.named_parameters()}
    for used, copies in UNUSED.items():
        of_step = {name.removeprefix(used): shape for name, shape in shapes.items() if name.startswith(used)}
        shapes |= {copy + name: shape for copy in copies for name, shape in of_step.items()}
    return shapes | language_model_shapes(SimpleNamespace(**language), SimpleNamespace(**config))


def _shape(model: str | Model) -> Model:
    if isinstance(model, Model):
        return model
    if model not in MODELS:
        raise ValueError(f'a model is one of {", ".join(MODELS)}; got {model!r}')
    return MODELS[model]


def _marker(model: str | Model) -> dict[str, Any]:
    return {'made_by': f'{MADE_BY} --like', 'like': model if isinstance(model, str) else ''}


def _write_all_but_weights(path: Path, shape: Model, marker: dict[str, Any]) -> None:
    write_json(path / MARKER, marker)
    token_ids = write_tokenizer(path)
    # Random weights score all tiles about alike, on either side of a fixed threshold. With none, half of the tiles of
    # any prompt are compressed.
    write_configuration(path, shape.size, shape.llm, shape.vit, shape.vocab_size, token_ids, absolute_threshold=0.0)


def _holds_weights(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in WEIGHTS)


def _broken_off(path: Path, marker: dict[str, Any]) -> bool:
    """Whether the weights in a directory are those of a run with the same arguments that did not get to its end."""
    try:
        same: bool = json.loads((path / MARKER).read_text()) == marker
    except (OSError, ValueError):
        return False
    return same and not (path / INDEX_FILE).exists()


def _check_space(path: Path, files: dict[str, dict[str, Shape]]) -> None:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    broken_off = sum((path / file).stat().st_size for file in files if (path / file).is_file())
    needed, free = shards.space_needed(files), shutil.disk_usage(there).free + broken_off
    if needed > free:
        raise NoSpaceError(
            f'the weights need {needed / 1e9:.1f} GB, and the disk of {path} has {free / 1e9:.1f} GB free'
        )
