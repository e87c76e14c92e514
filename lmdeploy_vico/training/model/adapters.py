"""LoRA: instead of the weights of a layer, a product of two small matrices that is added to them is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lmdeploy_vico.checkpoints.initialisation import seed_of
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.model.weights import assign, whole

NAME = 'default'
# Linear layers of the ViT, of mlp1 and of the language model. Experts are one tensor of a layer, and left alone.
TARGETS = (
    r'vision_model\..*\.(qkv|proj|fc1|fc2)|mlp1\.[13]'
    r'|language_model\.model\..*\.([qkvo]_proj|gate_proj|up_proj|down_proj)'
)
_ADAPTED = '.base_layer.weight'


def require_rank(rank: int) -> None:
    """Raise TrainingError unless adapters can have this rank; 0 stands for none."""
    if rank < 0:
        raise TrainingError('--lora-rank must be 0 or more.')


def add_adapters(model: nn.Module, rank: int, alpha: int) -> None:
    """Add adapters of a rank to every linear layer of :data:`TARGETS`; they change nothing until they are trained.

    Args:
        model: on the meta device.
        rank: of the products.
        alpha: they are scaled by alpha / rank.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), model, NAME)


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Initialise adapters that came from the meta device, as peft does: the first matrix uniform, the second zero."""
    for name, parameter in model.named_parameters():
        if '.lora_A.' in name:
            generator = torch.Generator().manual_seed((seed_of(name) << 20) + seed)
            bound = parameter.shape[1] ** -0.5
            assign(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif '.lora_B.' in name:
            assign(parameter, torch.zeros(parameter.shape))


def layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The layers that have adapters."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters: the frozen reference."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _enable(model, False, trained)
    try:
        yield
    finally:
        _enable(model, True, trained)


def _enable(model: nn.Module, enabled: bool, trained: Mapping[str, bool]) -> None:
    """Switch adapters on or off; what is trained, by name, stays so, though peft would change that.

    Where the model is sharded, other tensors may be its parameters before than after: both are told.
    """
    for layer in layers(model):
        layer.enable_adapters(enabled)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def is_adapted(name: str) -> bool:
    """Whether a parameter is a weight that an adapter adds to."""
    return name.endswith(_ADAPTED)


def merged(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A whole weight with what its adapter adds, in float32; any other parameter as it is."""
    if not is_adapted(name):
        return value
    layer = model.get_submodule(name.removesuffix(_ADAPTED))
    assert isinstance(layer, LoraLayer)
    down, up = (whole(layer.get_parameter(f'lora_{side}.{NAME}.weight').detach()) for side in 'AB')
    return value.float() + layer.scaling[NAME] * up.float() @ down.float()
