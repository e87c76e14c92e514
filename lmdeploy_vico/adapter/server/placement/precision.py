"""The data type in which the engine takes visual tokens. The vision side may compute in another one."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch


def engine_dtype(hf_config: Any, backend_config: Any) -> torch.dtype:
    """Return the data type that the engine will compute in, by LMDeploy's own decision.

    LMDeploy's ``mm_feature_dtype`` does not say it: that is the checkpoint's data type, or ``--dtype``. The engine
    computes in float16 if the language model is quantised with AWQ, or if the checkpoint is float32 and the device is
    not a CPU.

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
