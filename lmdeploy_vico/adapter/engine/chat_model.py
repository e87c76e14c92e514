"""The engine side: LMDeploy's own language model, whose prompts may carry visual tokens at given positions.

For a language model class X of LMDeploy (Qwen3ForCausalLM, Qwen3MoeForCausalLM, ...) ``VicoX`` is a subclass of it,
made on first use. CUDA graphs, LoRA, quantisation and tensor parallelism are therefore X's own, and vision weights are
never read in the engine process.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from lmdeploy.pytorch.config import QuantizationConfig
from lmdeploy.pytorch.engine.input_process import BaseModelInputProcessor, PreprocessInputResult
from lmdeploy.pytorch.model_inputs import StepContext
from lmdeploy.pytorch.models import patch

from lmdeploy_vico.adapter.engine.architectures import PREFIX, vico_architecture
from lmdeploy_vico.adapter.engine.quantisation import CheckpointQuantization
from lmdeploy_vico.adapter.engine.spans import VisualSpan
from lmdeploy_vico.adapter.handover import Span
from lmdeploy_vico.checkpoints.initialisation import fill
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL, VISION
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.kernels.pack import pack
from lmdeploy_vico.log import setup
from lmdeploy_vico.options import OVERRIDES_KEY, Options

MODALITY = 'image'


def __getattr__(name: str) -> type:
    """``VicoX`` for any architecture X that LMDeploy serves; LMDeploy looks the class up by this name."""
    if not name.startswith(PREFIX):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return vico_class(name[len(PREFIX) :])


@cache
def vico_class(architecture: str) -> type[Any]:
    """The subclass of LMDeploy's ``architecture`` that accepts visual tokens."""
    qualname = patch._get_module_map().get(architecture)
    if qualname is None:
        raise AttributeError(f'LMDeploy has no PyTorch model for the language model architecture {architecture!r}')
    language_model = patch._class_from_qualname(qualname)
    return type(vico_architecture(architecture), (VisualTokensMixin, language_model), {'__module__': __name__})


# What the mixin stands before: one of LMDeploy's language models, which share no typed base.
_LanguageModel: Any = object


class VisualTokensMixin(_LanguageModel):
    """Adds visual tokens to a language model of LMDeploy."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # In LMDeploy's engine process and its workers, where the options arrive as an attribute of the config.
        options = Options.load({OVERRIDES_KEY: getattr(config, OVERRIDES_KEY, {})})
        use(options.kernels)
        setup()
        super().__init__(config.llm_config, *args, **kwargs)
        self._compile_pack()
        self.vico_dummy_weights = options.dummy_weights

    def _compile_pack(self) -> None:
        """Have the kernel compiled now, rather than in the engine's loop while requests wait."""
        weight = self.get_input_embeddings().weight
        if weight.is_cuda:
            row = weight.new_zeros(1, weight.shape[1])
            pack(row, [row.clone()], [0], offsets=torch.zeros(1, dtype=torch.int64, device=row.device), groups=[0])

    def get_input_processor(self) -> BaseModelInputProcessor:
        """What turns a request's spans into LMDeploy's multimodal data."""
        return SpanProcessor()

    def prepare_inputs_for_generation(
        self,
        past_key_values: list[list[torch.Tensor]],
        inputs_embeds: torch.Tensor | None = None,
        context: StepContext = None,
    ) -> dict[str, Any]:
        """The language model's inputs; in a prefill with visual tokens, embeddings take the place of the token ids."""
        if inputs_embeds is None:
            inputs_embeds = self._embed_with_visual_tokens(context)
        return super().prepare_inputs_for_generation(past_key_values, inputs_embeds=inputs_embeds, context=context)

    def _embed_with_visual_tokens(self, context: StepContext) -> torch.Tensor | None:
        multimodals = context.input_multimodals or []
        spans = [(row, span) for row, data in enumerate(multimodals) for span in data.get(MODALITY, [])]
        if not spans:
            return None
        inputs_embeds = self.get_input_embeddings()(context.input_ids)
        # What was prefilled in earlier chunks, or found in the prefix cache, is history and not in this batch. These
        # lengths live on the device and stay there; positions are never read off the token ids, since a user can type
        # the image token and a model can generate it.
        begins = context.q_start_loc - context.vision_inputs.history_lengths
        pack(
            inputs_embeds[0],
            [span.data.to(inputs_embeds.device).contiguous() for _, span in spans],
            starts=[span.start for _, span in spans],
            offsets=begins,
            groups=[row for row, _ in spans],
        )
        return inputs_embeds

    @classmethod
    def update_quant_config(cls, quant_config: QuantizationConfig) -> QuantizationConfig:
        """What LMDeploy's layers ask, before they are built, whether and how they are quantised."""
        return CheckpointQuantization.of(quant_config, cls.packed_modules_mapping)

    @classmethod
    def rename_weight(cls, name: str) -> str:
        """Checkpoint name to parameter name: what lies below ``language_model.`` is ours."""
        return super().rename_weight(name.removeprefix(LANGUAGE_MODEL))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load one shard's language model tensors; the vision side is loaded where it runs."""
        super().load_weights((name, weight) for name, weight in weights if not name.startswith(VISION))

    def fill_with_dummy_weights(self) -> None:
        """Make up all weights of this process, of which no file is read then."""
        fill(self.named_parameters())

    def load_lora_weights(self, weights: Iterable[tuple[str, torch.Tensor]], adapter_id: int) -> None:
        """Load a PEFT adapter trained on the whole model or on the language model alone."""
        renamed = ((name.replace(f'.{LANGUAGE_MODEL}', '.', 1), weight) for name, weight in weights)
        if hasattr(super(), 'load_lora_weights'):
            super().load_lora_weights(renamed, adapter_id)
            return
        from lmdeploy.pytorch.adapter.adapter import load_lora_weights

        load_lora_weights(self, renamed, adapter_id)


class SpanProcessor(BaseModelInputProcessor):
    """Wraps the spans that the API process has checked; runs unguarded in the engine's loop, so it must not fail."""

    def preprocess_input(
        self, input_ids: list[int], input_multimodals: list[Span] | None = None, **kwargs: Any
    ) -> PreprocessInputResult:
        """Make LMDeploy's spans of ours; the ids already have their true length."""
        del kwargs
        spans = [
            VisualSpan(data=span.embeddings.tensor(), start=span.start, end=span.end, content_hash=span.content_hash)
            for span in input_multimodals or []
        ]
        return PreprocessInputResult(input_ids=input_ids, input_multimodals={MODALITY: spans} if spans else None)
