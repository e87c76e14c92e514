"""LMDeploy's operator backend for a host without an accelerator."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lmdeploy.pytorch.backends.activation import SiluAndMulBuildSpec
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.flash_attention import FlashAttentionBuildSpec
from lmdeploy.pytorch.backends.linear import LinearBuildSpec
from lmdeploy.pytorch.backends.lora import LoRABuildSpec
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec
from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingBuildSpec

from . import attention, operators

_BUILDERS: dict[type, Callable[[Any], Any]] = {
    PagedAttentionBuildSpec: attention.CpuPagedAttention,
    FlashAttentionBuildSpec: attention.CpuFlashAttention,
    LinearBuildSpec: lambda spec: operators.CpuLinear(),
    SiluAndMulBuildSpec: lambda spec: operators.CpuSiluAndMul(),
    FusedMoEBuildSpec: operators.CpuFusedMoE,
    LoRABuildSpec: lambda spec: operators.CpuLoRA(),
    MultinomialSamplingBuildSpec: lambda spec: operators.CpuMultinomialSampling(),
}


class CpuOpsBackend(DefaultOpsBackend):
    """Operators in plain PyTorch; the tensor-parallel group talks through gloo."""

    @staticmethod
    def get_name() -> str:
        """Name in LMDeploy's messages."""
        return 'cpu'

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> ImplT:
        """Build the operator of ``spec``; NotImplementedError names what the backend does not have."""
        builder = _BUILDERS.get(type(spec))
        if builder is not None:
            return builder(spec)
        try:
            return super().build_op(spec, enable_deterministic=enable_deterministic)
        except RuntimeError as error:
            operator = type(spec).__name__.removesuffix('BuildSpec')
            message = f'The CPU reference backend has no operator {operator}: serve this checkpoint on a CUDA device.'
            raise NotImplementedError(message) from error

    @staticmethod
    def get_attention_metadata_cls() -> type[attention.CpuAttentionMetadata]:
        """Class of ``StepContext.attn_metadata``."""
        return attention.CpuAttentionMetadata

    @classmethod
    def update_step_context(cls, step_context):
        """Give LMDeploy's step context its attention metadata."""
        step_context.attn_metadata = attention.build_metadata(step_context)
        return step_context

    @staticmethod
    @contextlib.contextmanager
    def model_build_context(ctx_mgr) -> Iterator[None]:
        """Build a model whose functions are not compiled: it would take minutes on a few cores and help little."""
        del ctx_mgr
        yield
        run_eagerly()

    @staticmethod
    def ccl_backend() -> str:
        """Collective library of the tensor-parallel group."""
        return 'gloo'

    @staticmethod
    def support_ray() -> bool:
        """Ray's executor runs where it is asked for, see :mod:`lmdeploy_vico.cpu.ray_patches`."""
        return True

    @staticmethod
    def device_count() -> int | None:
        """No limit on the ranks of a host."""
        return None


def run_eagerly() -> None:
    """Replace compiled functions in LMDeploy's loaded model and layer modules by the functions they were made from.

    LMDeploy decorates a few with ``torch.compile`` when their module is imported. Only those modules' names are
    changed; repeating it is harmless.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith(('lmdeploy.pytorch.models.', 'lmdeploy.pytorch.nn.', 'lmdeploy.pytorch.backends.')):
            continue
        for attribute, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, type):
                continue
            original = getattr(value, '_torchdynamo_orig_callable', None)
            if original is not None:
                setattr(module, attribute, original)
    rotary: Any = sys.modules.get('lmdeploy.pytorch.backends.default.rotary_embedding')
    if rotary is not None:
        # LMDeploy's own decorator, which compiles at the first call.
        rotary._rotary_embedding_fwd = inspect.unwrap(rotary._rotary_embedding_fwd)
