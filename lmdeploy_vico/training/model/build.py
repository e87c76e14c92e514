"""Models made without memory, their trained parts chosen, sharded, and then filled."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lmdeploy_vico.checkpoints.names import COMPRESSED_PROJECTOR, FULL_PROJECTOR, GATING, LANGUAGE_MODEL, POOLING, VIT
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.training.model.vico_model import RouterModel, VicoModel
from lmdeploy_vico.training.model.weights import Tensors, load, published_shapes
from lmdeploy_vico.vision.model.tower import VisionTower

Model = TypeVar('Model', bound=VisionTower)

# What can be trained, by the name that the command line has for it: how the names of its parameters begin.
PARTS = {
    'vit': (VIT,),
    'mlp1': (FULL_PROJECTOR,),
    'mlp2': (COMPRESSED_PROJECTOR,),
    'language': (LANGUAGE_MODEL,),
    'router': (POOLING, GATING),
}


def outline(config: Mapping[str, Any]) -> VicoModel:
    """The model on the meta device: names and shapes, no memory. No parameter requires a gradient.

    Args:
        config: the content of a ViCO checkpoint's ``config.json``.
    """
    with torch.device('meta'):
        return _untrained(VicoModel(config))


def outline_router(config: Mapping[str, Any]) -> RouterModel:
    """The same without the language model."""
    with torch.device('meta'):
        return _untrained(RouterModel(VicoConfig.from_dict(config)))


def _untrained(model: Model) -> Model:
    use('torch')  # the Triton kernels have no gradients
    return model.requires_grad_(False).eval()


def choose(model: nn.Module, parts: Sequence[str]) -> None:
    """Have the parameters of ``parts`` (keys of :data:`PARTS`) trained, and no others but adapters there are."""
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) or '.lora_' in name)


def set_types(model: nn.Module, frozen: torch.dtype) -> None:
    """Keep what is trained in float32, so that small steps are not lost, and everything else in ``frozen``."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What FSDP gathers and frees as one: every block of the ViT, every layer of the language model; by name."""
    for name, module in model.named_modules():
        if name.rpartition('.')[0] in ('vision_model.encoder.layers', 'language_model.model.layers'):
            yield name, module


def recompute(model: nn.Module) -> None:
    """Keep only the inputs of units for the gradient and compute what is in them again (gradient checkpointing)."""
    for _, unit in units(model):
        checkpoint(unit)


def shard(model: nn.Module, compute: torch.dtype) -> None:
    """Shard over all processes (FSDP2); gradients are averaged over them in float32.

    Args:
        model: on the meta device or filled.
        compute: of gathered parameters and activations.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for _, unit in units(model):
        fully_shard(unit, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def fill(model: Model, directories: Sequence[Path], device: torch.device) -> Model:
    """Take memory on the device and read every parameter from checkpoints, the first that has it.

    Raises:
        UnsupportedCheckpointError: a tensor is missing, quantised or misshapen.
    """
    tensors = Tensors(*directories)
    tensors.require(published_shapes(model.named_parameters()))
    model.to_empty(device=device)
    load(model.named_parameters(), tensors)
    if isinstance(model, VicoModel):
        # Frequencies are in no checkpoint, and what the meta device holds of them is nothing.
        language = model.language_model.model
        with device:
            language.rotary_emb = type(language.rotary_emb)(language.config)
    return model
