"""A plain InternVL checkpoint becomes one with a projector of compressed tiles and a router, both untrained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmdeploy_vico.checkpoints.initialisation import Spread, seed_of, spread
from lmdeploy_vico.checkpoints.names import FLASH, GATING, Shape
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.config import VicoConfig, is_vico
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.model.vico_model import TIED
from lmdeploy_vico.training.model.weights import Tensors
from lmdeploy_vico.training.model.writer import CONFIG, publish

RELATIVE_THRESHOLD = 0.0
ABSOLUTE_THRESHOLD = 0.5  # paper, section 4.5
CLASSIFIER = f'{GATING}gate.1.weight'


def initialise(source: Path, path: Path, seed: int = 0) -> None:
    """Write the checkpoint ``source`` with fresh ``mlp2``, router and thresholds into the folder ``path``.

    Weights have a variance of 1 / fan-in. The classifier's are zero: every tile scores 0.5, none more than the others,
    so a server compresses nothing until the router is trained.

    Raises:
        TrainingError: the source is a ViCO checkpoint already, or the folder is not empty.
        UnsupportedCheckpointError: the source is no InternVL checkpoint that is supported.
    """
    config = read_config(source)
    if is_vico(config):
        raise TrainingError(f'{source} is a ViCO checkpoint already: train it as it is.')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TrainingError(f'{path} exists and is not an empty folder: choose another.')
    thresholds = {
        'flash_relative_threshold': RELATIVE_THRESHOLD,
        'flash_absolute_threshold': ABSOLUTE_THRESHOLD,
    }
    config = config | {'flash_mode': True} | thresholds
    VicoConfig.from_dict(config)
    tensors = Tensors(source)
    if config['llm_config'].get('tie_word_embeddings'):
        raise TrainingError(TIED)
    try:
        shapes = checkpoint_shapes(config)
    except AttributeError as error:
        raise TrainingError(f'{source}: llm_config of its config.json has no {error.name}: write it down.') from error
    tensors.require({name: shape for name, shape in shapes.items() if not name.startswith(FLASH)})
    path.mkdir(parents=True, exist_ok=True)
    new = {name: shape for name, shape in shapes.items() if name.startswith(FLASH)}
    publish(path, config, source, tensors, new, fresh(new, seed))


def fresh(shapes: dict[str, Shape], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Untrained tensors of these shapes, float32; each depends on the seed and its own name alone."""
    for name, shape in shapes.items():
        wanted = Spread(0.0) if name == CLASSIFIER else spread(name, shape)
        generator = torch.Generator().manual_seed((seed_of(name) << 20) + seed)
        yield name, torch.randn(shape, generator=generator) * wanted.std + wanted.mean


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint; raises TrainingError where there is none."""
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise TrainingError(f'{path} is not a checkpoint: its config.json cannot be read ({error}).') from error
    if not isinstance(config, dict):
        raise TrainingError(f'{path} is not a checkpoint: its config.json is not an object.')
    return config
