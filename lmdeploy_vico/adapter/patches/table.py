"""The table of all patches, and the set-up of those that this process needs.

Runs while ``lmdeploy`` may be half imported, so nothing here imports it: a patch is applied once the LMDeploy module
that it changes is complete.
"""

import importlib.metadata
import logging

from lmdeploy_vico.adapter.patches import engine, forms, generation, lifecycle, ranks, server, start, turbomind
from lmdeploy_vico.cpu import patches as cpu
from lmdeploy_vico.patching import Patch, Trigger, register

logger = logging.getLogger(__name__)

SUPPORTED = ((0, 18), (0, 19))  # from the first to before the second; a test compares it with pyproject.toml


def supported_range() -> str:
    """The versions of LMDeploy that the patches are made for, as ``>= 0.18, < 0.19``."""
    first, end = ('.'.join(map(str, version)) for version in SUPPORTED)
    return f'>= {first}, < {end}'


def is_supported(version: str) -> bool:
    """Return whether the patches are made for LMDeploy ``version``."""
    numbers = tuple(int(part) for part in version.split('.')[:2] if part.isdigit())
    return SUPPORTED[0] <= numbers < SUPPORTED[1]


def all_patches() -> tuple[Patch, ...]:
    """Every change to LMDeploy, in the order in which those of one module are made."""
    from lmdeploy_vico.cpu import engine as cpu_engine

    return (
        *cpu.PATCHES,
        *cpu_engine.PATCHES,
        *start.PATCHES,
        *start.SERVER_PATCHES,
        *server.PATCHES,
        *turbomind.PATCHES,
        *forms.PATCHES,
        *generation.PATCHES,
        *lifecycle.PATCHES,
        *ranks.PATCHES,
        *engine.PATCHES,
    )


def can_be_checked(patch: Patch) -> bool:
    """Return whether the module of a patch can be imported here: TurboMind's needs a CUDA driver."""
    from lmdeploy import turbomind

    return patch.trigger is not Trigger.TURBOMIND or bool(turbomind.is_available())


def set_up(cpu_only: bool = False) -> None:
    """Install the patches of this process.

    With ``cpu_only`` LMDeploy's own classes serve every model, on the CPU backend if the machine has no CUDA device.
    An unsupported LMDeploy is left untouched, with one warning.
    """
    version = importlib.metadata.version('lmdeploy')
    if not is_supported(version):
        logger.warning(
            'lmdeploy-vico supports LMDeploy %s, but %s is installed: the plugin is off and ViCO checkpoints are '
            'served by LMDeploy itself. Install a supported LMDeploy to use it.',
            supported_range(),
            version,
        )
        return
    register.install((*cpu.PATCHES, *start.PATCHES))
    if not cpu_only:
        tables = (server, turbomind, forms, generation, lifecycle, ranks, engine)
        register.install(start.SERVER_PATCHES)
        register.install(patch for table in tables for patch in table.PATCHES)
