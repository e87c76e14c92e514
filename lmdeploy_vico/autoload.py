"""The plugin's entry point: called at the end of every ``import torch``.

It is declared in the ``torch.backends`` group, PyTorch's documented way to load an extension in every process, which is
what reaches LMDeploy's spawned engine process and its tensor-parallel workers without a change to the command line.
Nothing of this package but this module is loaded until LMDeploy is imported, and no exception may leave
:func:`register`: it would break ``import torch`` for every program on the machine.
"""

import logging
import os
from types import ModuleType

SWITCH = 'LMDEPLOY_VICO'
MODES = ('1', 'cpu', '0')
OFF = ('no', 'off', 'false')  # count as 0

logger = logging.getLogger(__name__)


def register() -> None:
    """Arrange for the plugin to be set up when ``lmdeploy`` is imported; called by PyTorch.

    The environment variable ``LMDEPLOY_VICO`` chooses what is set up: ``1`` (the default) everything, ``cpu`` only the
    backend that runs LMDeploy's engine without a GPU, ``0`` nothing.
    """
    mode = switch()
    if mode not in MODES:
        logger.warning('%s=%r is not one of %s: treated as 1', SWITCH, mode, ', '.join(MODES))
        mode = '1'
    if mode == '0':
        return
    try:
        import wrapt

        # Fires at once when torch is being imported by LMDeploy itself, whose package is then half imported: what is
        # set up then waits for modules that LMDeploy imports later, and never imports LMDeploy.
        wrapt.register_post_import_hook(lambda module: _on_lmdeploy_import(module, mode), 'lmdeploy')
    except Exception:
        logger.exception('lmdeploy-vico could not be set up; LMDeploy runs without it')


def switch() -> str:
    """What the environment says: one of ``MODES``, or whatever else stands there."""
    mode = os.environ.get(SWITCH, '1').strip().lower() or '1'
    return '0' if mode in OFF else mode


def _on_lmdeploy_import(module: ModuleType, mode: str) -> None:
    del module
    try:
        from lmdeploy_vico.adapter.patches import table

        table.set_up(cpu_only=mode == 'cpu')
    except Exception:
        logger.exception('lmdeploy-vico could not be set up; LMDeploy runs without it')
