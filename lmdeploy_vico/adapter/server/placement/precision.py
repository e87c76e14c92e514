"""The data type in which visual tokens are handed on, which need not be that of the vision side."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch


def engine_dtype(hf_config: Any, backend_config: Any) -> torch.dtype:
    """What the engine is going to compute in, as LMDeploy decides it there.

    Its ``mm_feature_dtype`` is what the checkpoint is written in, or ``--dtype``. The engine computes in float16
    whenever the language model is quantised with AWQ, or the checkpoint is float32 and the device no CPU.

    Args:
        hf_config: the checkpoint's; not changed.
        backend_config: LMDeploy's PytorchEngineConfig.
    """
    from lmdeploy.pytorch import config

    # LMDeploy writes into both.
    model_config = SimpleNamespace(hf_config=deepcopy(hf_config), dtype=None)
    dtype: torch.dtype = config._update_torch_dtype(
        model_config, backend_config.dtype, device_type=backend_config.device_type
    ).dtype
    return dtype
