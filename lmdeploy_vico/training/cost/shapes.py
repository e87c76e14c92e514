"""What a model is made of, counted on the meta device: parameters of its parts, units of FSDP, work of a pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lmdeploy_vico.checkpoints import flops
from lmdeploy_vico.checkpoints.names import VIT
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.training.model.adapters import add_adapters
from lmdeploy_vico.training.model.build import PARTS, outline, units
from lmdeploy_vico.training.model.vico_model import VicoModel
from lmdeploy_vico.training.model.weights import is_adapter

_EXPERTS = '.mlp.experts.'


@dataclass(frozen=True)
class Shapes:
    """A model's sizes.

    Attributes:
        parameters: of each part, see :data:`~lmdeploy_vico.training.model.build.PARTS`.
        units: parameters of each unit of FSDP, by name; the root's, which is all the rest, last.
        llm: the language model's section of the config.
        vit_width, vit_layers: of the ViT.
        active: of the language model's layers, the parameters that a token meets.
        adapters: parameters of adapters in each unit, which are in none of the other numbers; empty without adapters.
    """

    parameters: dict[str, int]
    units: dict[str, int]
    llm: Mapping[str, Any]
    vit_width: int
    vit_layers: int
    active: int
    adapters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], lora_rank: int = 0) -> 'Shapes':
        """Count the model of a ViCO checkpoint's config; nothing takes memory.

        Args:
            config: the content of its ``config.json``.
            lora_rank: of adapters; 0 for none.
        """
        model, llm = outline(config), config['llm_config']
        parameters = {
            part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
            for part, prefixes in PARTS.items()
        }
        gathered = {name: _count(unit) for name, unit in units(model)}
        gathered['root'] = _count(model) - sum(gathered.values())
        layers = model.language_model.model.layers
        experts = sum(p.numel() for name, p in layers.named_parameters() if _EXPERTS in f'.{name}')
        share = llm['num_experts_per_tok'] / llm['num_experts'] if experts else 0
        return cls(
            parameters,
            gathered,
            llm,
            vit_width=config['vision_config']['hidden_size'],
            vit_layers=config['vision_config']['num_hidden_layers'],
            active=_count(layers) - round(experts * (1 - share)),
            adapters=_adapters(model, lora_rank) if lora_rank else {},
        )

    @property
    def total(self) -> int:
        """All parameters that are used; attention and norms 3 and 4 of the router are stored and not used."""
        return sum(self.parameters.values())

    @property
    def largest_unit(self) -> int:
        """Parameters of the largest unit but the root."""
        return max(count for name, count in self.units.items() if name != 'root')

    def vit_flops(self, tiles: float) -> float:
        """FLOP of the ViT's forward pass."""
        blocks = sum(count for name, count in self.units.items() if name.startswith(VIT))
        return tiles * flops.vit_flops(blocks, self.vit_width, self.vit_layers)

    def projector_flops(self, full: float, compressed: float) -> float:
        """FLOP of the projectors' forward passes for so many tiles of either kind."""
        counts = (('mlp1', full * TOKENS_FULL), ('mlp2', compressed * TOKENS_COMPRESSED))
        return sum(2 * self.parameters[part] * tokens for part, tokens in counts)

    def language_flops(self, tokens: float, responses: float) -> float:
        """FLOP of the language model's forward pass; the head is computed where responses are predicted."""
        llm = self.llm
        width = llm['num_attention_heads'] * llm['head_dim']
        attention = flops.causal_attention_flops(tokens, width, llm['num_hidden_layers'])
        head = 2 * llm['hidden_size'] * llm['vocab_size'] * responses
        return 2 * self.active * tokens + attention + head


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _adapters(model: VicoModel, rank: int) -> dict[str, int]:
    """Add adapters to a model and count their parameters by unit."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for name, parameter in module.named_parameters() if is_adapter(name))

    add_adapters(model, rank, 2 * rank)
    by_unit = {name: count(unit) for name, unit in units(model)}
    return by_unit | {'root': count(model) - sum(by_unit.values())}
