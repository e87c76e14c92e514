"""Attaches the plugin to LMDeploy through post-import hooks.

Runs while ``lmdeploy`` may be half imported, so neither this module nor the two hook tables import it: every hook gets
the LMDeploy module it waits for once that module is complete.
"""

import importlib.metadata
import logging
from collections.abc import Callable
from types import ModuleType

import wrapt

logger = logging.getLogger(__name__)

SUPPORTED = ((0, 18), (0, 19))
Hook = Callable[[ModuleType], None]

_registered = False
_failed: list[str] = []


def lmdeploy_version_supported(version: str) -> bool:
    """Whether the plugin's patches fit LMDeploy ``version`` (>= 0.18, < 0.19)."""
    numbers = tuple(int(part) for part in version.split('.')[:2] if part.isdigit())
    return SUPPORTED[0] <= numbers < SUPPORTED[1]


def register(cpu_only: bool = False) -> None:
    """Install the post-import hooks, once per process.

    With ``cpu_only`` LMDeploy's own classes serve every model, on the CPU backend if the machine has no CUDA device.
    An unsupported LMDeploy is left untouched, with one warning.
    """
    global _registered
    if _registered:
        return
    _registered = True
    version = importlib.metadata.version('lmdeploy')
    if not lmdeploy_version_supported(version):
        logger.warning(
            'lmdeploy-vico supports LMDeploy >= 0.18, < 0.19, but %s is installed: the plugin is off and '
            'ViCO checkpoints are served by LMDeploy itself. Install a supported LMDeploy to use it.',
            version,
        )
        return
    from lmdeploy_vico.adapter.patches.engine_start import HOOKS as START_HOOKS
    from lmdeploy_vico.cpu.hooks import HOOKS as CPU_HOOKS

    hooks = [*CPU_HOOKS.items(), *START_HOOKS.items()]
    if not cpu_only:
        from lmdeploy_vico.adapter.patches.hooks import HOOKS as ADAPTER_HOOKS

        hooks += ADAPTER_HOOKS.items()
    for name, hook in hooks:
        wrapt.register_post_import_hook(_guarded(hook, name), name)


def require_all_hooks() -> None:
    """Raise RuntimeError if a hook failed in this process: a ViCO checkpoint would be served wrongly."""
    if _failed:
        raise RuntimeError(
            f'lmdeploy-vico could not attach itself to {", ".join(_failed)}; see the log for the reason.'
        )


def _guarded(hook: Hook, name: str) -> Hook:
    def run(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception:
            # Raising here would break `import lmdeploy...` in programs that have nothing to do with ViCO; those that
            # do are stopped by require_all_hooks().
            _failed.append(name)
            logger.exception('lmdeploy-vico: the hook on %s failed; ViCO checkpoints cannot be served', name)

    return run
