"""Serve InternVL3.5-Flash (ViCO) models with LMDeploy.

The names below are public; docs/api.md describes them. Everything else may change without notice.
They are loaded when they are first used: `lmdeploy_vico.autoload` is called by `import torch` in every process, so
importing this package must load nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy_vico.choices import Compression
    from lmdeploy_vico.config import VicoConfig
    from lmdeploy_vico.options import Options
    from lmdeploy_vico.vision.encoder import VisionEncoder
    from lmdeploy_vico.vision.routing import route

__version__ = '0.1.0'
__all__ = ['Compression', 'Options', 'VicoConfig', 'VisionEncoder', 'route']

_HOMES = {
    'Compression': 'choices',
    'Options': 'options',
    'VicoConfig': 'config',
    'VisionEncoder': 'vision.encoder',
    'route': 'vision.routing',
}


if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        from importlib import import_module

        value = getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
        globals()[name] = value  # so that this function is asked once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
