"""LMDeploy's quantised layers for the language model of a ViCO checkpoint.

LMDeploy names a layer as it builds it: ``model.layers.0.self_attn.qkv_proj``. A checkpoint lists what is not quantised
as it stores it: ``language_model.model.layers.0.self_attn.q_proj``, or a regular expression for such names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lmdeploy.pytorch.config import QuantizationConfig

from lmdeploy_vico.checkpoints.language_model import fused_modules
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.skipped_modules import SkippedModules
from lmdeploy_vico.config import UnsupportedCheckpointError

PackedModules = Mapping[str, Sequence[str]]
EXPERT_PROJECTIONS = ('gate_proj', 'up_proj', 'down_proj')
# The methods that LMDeploy 0.18 has for each kind of layer. It reports others only in the engine process.
SERVED = {
    'linear': ('awq', 'fp8', 'smooth_quant'),
    'moe': ('compressed-tensors', 'fp8', 'smooth_quant'),
}
_KINDS = {'linear': 'attention and dense layers', 'moe': 'experts'}


@dataclass
class CheckpointQuantization(QuantizationConfig):
    """LMDeploy's quantisation config, which looks a layer up by its names in the checkpoint.

    Attributes:
        skipped: modules of the checkpoint that are not quantised.
        packed: for each layer that LMDeploy fuses, the checkpoint's modules of which it consists.
    """

    skipped: SkippedModules = field(default_factory=lambda: SkippedModules({}))
    packed: PackedModules = field(default_factory=dict)

    @classmethod
    def of(cls, config: QuantizationConfig, packed: PackedModules) -> QuantizationConfig:
        """Return ``config`` as one that uses the checkpoint's names; itself if it is one, or is not quantised."""
        if config is None or config.quant_method is None or isinstance(config, cls):
            return config
        values = {one.name: getattr(config, one.name) for one in fields(QuantizationConfig)}
        # LMDeploy would look for its own names in this list.
        values['ignored_layers'] = []
        return cls(**values, skipped=SkippedModules(config.hf_quant_config), packed=packed)

    def get_quant_method(self, prefix: str = '', module_kind: str = 'linear') -> str | None:
        """Return how a layer is quantised; None if it is not.

        Args:
            prefix: LMDeploy's name for the layer.
            module_kind: 'linear', 'moe' or 'norm'.

        Raises:
            UnsupportedCheckpointError: a part of a fused layer is quantised and another is not.
        """
        names = list(self._stored_as(prefix, module_kind)) if prefix else []
        skipped = [name for name in names if name in self.skipped]
        if skipped and len(skipped) < len(names):
            quantised = next(name for name in names if name not in skipped)
            raise UnsupportedCheckpointError(
                f'{skipped[0]} is not quantised in the checkpoint and {quantised} is, but LMDeploy computes them as '
                'one layer: use a checkpoint in which both are, or neither.'
            )
        method: str | None = super().get_quant_method(prefix, module_kind)
        return None if skipped else method

    def _stored_as(self, prefix: str, module_kind: str) -> Iterator[str]:
        """Iterate over the checkpoint's names of a layer's parts; for experts over those of the first expert."""
        parent, _, name = f'{LANGUAGE_MODEL}{prefix}'.rpartition('.')
        if module_kind == 'moe':
            return (f'{parent}.{name}.0.{projection}' for projection in EXPERT_PROJECTIONS)
        return (f'{parent}.{part}' for part in self.packed.get(name, (name,)))


def check_quantisation(hf_config: Any, packed: PackedModules) -> None:
    """Check that LMDeploy's PyTorch engine can serve the quantised layers of a checkpoint's language model.

    Args:
        hf_config: the whole checkpoint's, with ``--hf-overrides`` applied.
        packed: as in :class:`CheckpointQuantization`.

    Raises:
        UnsupportedCheckpointError: it cannot; the message names the layer and the method.
    """
    try:
        config = QuantizationConfig.from_config(hf_config)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedCheckpointError(
            f'The PyTorch engine of LMDeploy cannot serve the quantization_config of this checkpoint: {error}'
        ) from error
    quantisation = CheckpointQuantization.of(config, packed)
    for prefix, kind in fused_modules(hf_config.llm_config):
        method = quantisation.get_quant_method(prefix, kind)
        if method is not None and method not in SERVED[kind]:
            raise UnsupportedCheckpointError(
                f'{LANGUAGE_MODEL}{prefix} is quantised as {method}, which the PyTorch engine of LMDeploy does not '
                f'have for {_KINDS[kind]}, only {", ".join(SERVED[kind])}: use a checkpoint that leaves these '
                'unquantised.'
            )
