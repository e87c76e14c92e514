"""Faster ways to compute parts of the ViT, each behind a switch that is off until a GPU has shown what it gains.

None changes what is computed, but each may change its last bits: a switch belongs to a server's configuration, like the
data type, and a tile's tokens are still the same alone and in any batch. ``python -m benchmarks vit-speed``
compares them.
"""

import logging

import torch

from lmdeploy_vico.choices import Speedups
from lmdeploy_vico.config import GRID, InternViTConfig
from lmdeploy_vico.kernels.implementation import TRITON, implementation
from lmdeploy_vico.options import OptionError

HOPPER = (9, 0)

logger = logging.getLogger(__name__)


class UnsupportedSpeedupError(OptionError):
    """A speed-up that was asked for cannot run here; the message names it and says why."""


def require_speedups(speedups: Speedups, config: InternViTConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise :class:`UnsupportedSpeedupError` unless all that are on can run; say in the log which are on."""
    for name in speedups.names():
        obstacle = find_obstacle(name, config, device, dtype)
        if obstacle:
            raise UnsupportedSpeedupError(f'vit_speedups: {name} {obstacle}; leave it out.', 'vit_speedups')
    if speedups:
        logger.info('ViT speed-ups on %s: %s', device, speedups)


def find_obstacle(name: str, config: InternViTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why a speed-up cannot run for this ViT on this device, as the rest of a sentence; empty where it can."""
    if name == 'cudnn_attention':
        return _cudnn_obstacle(config, device, dtype)
    if name == 'strided_qk_norm' and not config.qk_normalization:
        return 'needs a ViT that normalises q and k, such as InternViT-6B, and this one does not'
    if name in ('residual_norm', 'strided_qk_norm') and implementation(device) != TRITON:
        return f'needs the Triton kernels, and on {device} plain torch computes what they would'
    return ''


def _cudnn_obstacle(config: InternViTConfig, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != 'cuda':
        return f'needs a CUDA device, and the vision side runs on {device}'
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER:
        wanted, given = ('.'.join(map(str, version)) for version in (HOPPER, capability))
        return f'is for Hopper GPUs (compute capability {wanted}), and {device} has {given}'
    if dtype not in (torch.float16, torch.bfloat16):
        return f'needs float16 or bfloat16, and the vision side computes in {str(dtype).removeprefix("torch.")}'
    if not torch.backends.cudnn.is_available() or not hasattr(torch.ops.aten, '_scaled_dot_product_cudnn_attention'):
        return f'needs cuDNN attention, which this build of torch ({torch.__version__}) does not have'
    return _cudnn_trial(config, device, dtype)


@torch.inference_mode()
def _cudnn_trial(config: InternViTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What torch's own conditions (they know faulty versions of cuDNN) or cuDNN itself say against one tile."""
    fused = torch.zeros(1, GRID * GRID + 1, 3, config.num_attention_heads, config.head_size, dtype=dtype, device=device)
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    version = torch.backends.cudnn.version()
    if not torch.backends.cuda.can_use_cudnn_attention(params):
        return f'is refused by torch for heads of {config.head_size} with cuDNN {version}'
    try:
        cudnn_attention(query, key, value)
    except RuntimeError as error:
        return f'fails with cuDNN {version} on {device} ({str(error).splitlines()[0]})'
    return ''


def cudnn_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, heads, T, d]`` by cuDNN and nothing else; in float16 or bfloat16, without gradients.

    This is the operation that ``F.scaled_dot_product_attention`` would choose. The public way to make it choose,
    ``torch.nn.attention.sdpa_kernel``, sets and restores the state of the whole process: two replicas that capture side
    by side would restore it for each other, and a language model's engine in this process would see it.
    """
    attended: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
    return attended
