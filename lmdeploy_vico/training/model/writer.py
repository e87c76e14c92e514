"""The published layout: what training has made, in files that a server takes as they are."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lmdeploy_vico.checkpoints.random import shards
from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE, index_text
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.training.model.adapters import is_adapted, merged
from lmdeploy_vico.training.model.weights import (
    TYPES,
    Tensors,
    disassemble,
    is_adapter,
    plain_name,
    published_shapes,
    whole,
)

CONFIG = 'config.json'
# What is not copied: weights, config, and what an earlier stage's run keeps beside the checkpoint that it has written.
_WEIGHTS = ('*.safetensors', INDEX_FILE, '*.bin', CONFIG, '.*')
_RUN = ('training.json', 'report.json', 'divergence-*.json', 'log.jsonl', 'ratios-*.jsonl', 'held-out-*.jsonl')


def publish(
    path: Path,
    config: Mapping[str, Any],
    source: Path,
    tensors: Tensors,
    names: Collection[str],
    made: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Write a checkpoint: weights in files of 4 GB (in bfloat16), their index, then the other files of the source.

    Args:
        path: the folder.
        config: the content of its ``config.json``.
        source: the checkpoint whose tokenizer and other files are taken.
        tensors: what is not made anew; types are those of its tensors, or of the ``dtype`` in the config.
        names: the tensors that are.
        made: these and their values, about in the order of the files.
    """
    named = getattr(torch, str(config.get('dtype') or config.get('torch_dtype')), None)
    default = named if isinstance(named, torch.dtype) else torch.bfloat16  # transformers writes "auto", too
    waiting: dict[str, torch.Tensor] = {}

    def take(name: str) -> torch.Tensor:
        kind = TYPES[tensors.dtypes[name]] if name in tensors.dtypes else default
        while name in names and name not in waiting:
            other, value = next(made)
            waiting[other] = value.to('cpu')
        return (waiting.pop(name) if name in names else tensors.read(name)).to(kind).contiguous()

    total = 0
    placed: dict[str, str] = {}
    for file, shapes in shards.plan(checkpoint_shapes(config)).items():
        values = {name: take(name) for name in shapes}
        save_file(values, path / file, metadata={'format': 'pt'})
        (path / file).chmod(0o644)  # safetensors makes files that only their owner can read
        total += sum(value.nbytes for value in values.values())
        placed |= dict.fromkeys(values, file)
    (path / INDEX_FILE).write_text(index_text(placed, total), encoding='utf-8')
    copy_rest(source, path)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def copy_rest(source: Path, path: Path) -> None:
    """Copy what a checkpoint has besides weights and config: tokenizer, chat template, licence."""
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in (*_WEIGHTS, *_RUN)):
            shutil.copyfile(file, path / file.name)


def publish_model(
    path: Path,
    config: Mapping[str, Any],
    source: Path,
    model: nn.Module,
    trained: Callable[[str], bool],
    first: bool,
) -> None:
    """Write the checkpoint of a model; all processes have to call this.

    Args:
        path, config, source: as for :func:`publish`.
        model: whole or sharded.
        trained: whether a parameter of this name has been; all others are the source's, which may be more precise.
        first: whether this process is the one that writes.
    """
    parameters = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not is_adapter(name) and (trained(name) or is_adapted(name))
    ]
    made = _published(model, parameters)
    if first:
        publish(path, config, source, Tensors(source), published_shapes(parameters), made)
    for _ in made:  # to the end in every process, as each has a part of each tensor
        pass


def _published(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters:
        yield from disassemble(plain_name(name), merged(model, name, whole(parameter.detach())))
