"""Post-import hooks of the CPU backend."""

from collections.abc import Callable
from types import ModuleType

HOOKS: dict[str, Callable[[ModuleType], None]] = {}
