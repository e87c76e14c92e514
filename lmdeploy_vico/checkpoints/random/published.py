"""Checkpoints of the published models' sizes, for measuring: without or with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmdeploy_vico.checkpoints.names import Shape
from lmdeploy_vico.checkpoints.random import shards
from lmdeploy_vico.checkpoints.random.configuration import published_config
from lmdeploy_vico.checkpoints.random.limits import MADE_BY, MARKER
from lmdeploy_vico.checkpoints.random.tiny import prepare_directory, write_configuration, write_json
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS, write_tokenizer
from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.checkpoints.sizes import MODELS, Model

WEIGHTS = ('*.safetensors', '*.safetensors.index.json')


class WeightsExistError(FileExistsError):
    """A directory holds weights that would not belong to the config that is to be written."""


class NoSpaceError(OSError):
    """The disk has not enough room for the weights."""


def make_checkpoint_without_weights(path: str | Path, model: str | Model, force: bool = False) -> Path:
    """Write config and tokenizer of a model, to be served with ``LMDEPLOY_VICO_DUMMY_WEIGHTS=1``; return the directory.

    The tokenizer is that of the tiny checkpoints, so most token ids that such a model generates have no text. The
    routing thresholds have half of the tiles of any prompt compressed.

    Args:
        path: the directory.
        model: one of :data:`MODELS`, or other dimensions.
        force: write into a directory that holds something else.

    Raises:
        ValueError: the name is unknown.
        WeightsExistError: ``path`` holds weights.
        FileExistsError: ``path`` holds anything but a random checkpoint, and ``force`` is not set.
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

    As :func:`make_checkpoint_without_weights`, and with every tensor of a published checkpoint, in files of 4 GB. A run
    that breaks off leaves files without an index, which no server loads. The same call writes them again.

    Args:
        path, model, force: as for :func:`make_checkpoint_without_weights`.
        seed: of the weights; the same seed gives the same bytes.
        done: called every few megabytes with the number of bytes written since the last call. They add up to
            :func:`weight_bytes`.

    Raises:
        ValueError: the name is unknown.
        NoSpaceError: the disk has too little room for the weights; nothing has been written.
        WeightsExistError: ``path`` holds other weights, or complete ones.
        FileExistsError: ``path`` holds anything but a random checkpoint, and ``force`` is not set.
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
    """Return the size of a model's weights in bytes, in bfloat16."""
    return shards.nbytes(tensor_shapes(_shape(model)))


def tensor_shapes(model: Model) -> dict[str, Shape]:
    """Return name and shape of every tensor in a checkpoint of this model."""
    return checkpoint_shapes(config_of(model))


def config_of(model: str | Model) -> dict[str, Any]:
    """Return the config of a model for what depends on shapes alone: all its tokens have the id 0."""
    return published_config(_shape(model), dict.fromkeys(SPECIAL_TOKENS, 0))


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
    write_configuration(path, published_config(shape, token_ids), token_ids)


def _holds_weights(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in WEIGHTS)


def _broken_off(path: Path, marker: dict[str, Any]) -> bool:
    """Return whether a directory's weights are from a run with the same arguments that did not finish."""
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
