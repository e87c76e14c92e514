"""Random checkpoints in the layout of InternVL3.5-Flash.

Tiny ones serve tests, demonstrations and development without a GPU. They have real token counts (448x448 tiles, 1024
patch tokens, 64 or 256 visual tokens) and a router that compresses smooth tiles and keeps detailed ones full. Their
answers mean nothing, but depend on every picture and every word.

Checkpoints of the published sizes, without or with random weights, serve measurements.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy_vico.checkpoints.random.published import make_checkpoint_with_weights, make_checkpoint_without_weights
    from lmdeploy_vico.checkpoints.random.tiny import is_tiny_checkpoint, make_tiny_checkpoint

__all__ = [
    'is_tiny_checkpoint',
    'make_checkpoint_with_weights',
    'make_checkpoint_without_weights',
    'make_tiny_checkpoint',
]


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: these modules load torch, and starting a server needs none."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from lmdeploy_vico.checkpoints.random import published, tiny

    return getattr(published if hasattr(published, name) else tiny, name)
