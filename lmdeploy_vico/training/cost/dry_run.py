"""``--dry-run``: what a stage would cost, for published sizes or for a checkpoint."""

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lmdeploy_vico.checkpoints.random.published import MODELS, config_of
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.cost import estimate
from lmdeploy_vico.training.cost.estimate import Estimate, Workload
from lmdeploy_vico.training.cost.shapes import Shapes
from lmdeploy_vico.training.cost.table import show
from lmdeploy_vico.training.model.adapters import require_rank
from lmdeploy_vico.training.stages.initialise import read_config


def dry_run(arguments: argparse.Namespace, stage: str, console: Console) -> None:
    """Print the estimate; raises TrainingError for a model that is not known, or a rank that cannot be."""
    rank = getattr(arguments, 'lora_rank', 0)
    require_rank(rank)
    work = Workload(
        tiles=arguments.tiles,
        text=arguments.text,
        gpus=arguments.gpus,
        flops=arguments.tflops * 1e12,
        batch=arguments.batch,
        micro_batch=arguments.micro_batch,
        steps=arguments.steps,
        warm_up=getattr(arguments, 'warm_up_steps', 0),
    )
    rows: dict[str, tuple[Shapes, Estimate]] = {}
    for name, config in _configs(arguments).items():
        shapes = Shapes.of(config, rank)
        router = stage == 'router'
        cost = estimate.router(shapes, work) if router else estimate.consistency(shapes, arguments.train, work)
        rows[name] = shapes, cost
    show(f'train {stage}, estimated', rows, work, console)


def _configs(arguments: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    if arguments.model and not arguments.like:
        return {arguments.model.name: read_config(arguments.model)}
    names = arguments.like or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise TrainingError(f'--like takes {", ".join(MODELS)}, not {", ".join(unknown)}.')
    return {name: config_of(name) for name in names}
