"""Post-import hooks of the adapter."""

from collections.abc import Callable
from types import ModuleType

HOOKS: dict[str, Callable[[ModuleType], None]] = {}
