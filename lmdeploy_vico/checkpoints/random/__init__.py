"""Small random checkpoints in the layout of InternVL3.5-Flash, for tests, demonstrations and development without a GPU.

The small ones have real token counts (448x448 tiles, 1024 patch tokens, 64 or 256 visual tokens), a router that sends
smooth tiles to 64 tokens and detailed ones to 256, and answers that depend on every picture and every word; they know
nothing. Those of the published sizes come without weights or with random ones, for measuring.
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
    """Checkpoints need torch, and are loaded when asked for: running a server (``launch``) needs none."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from lmdeploy_vico.checkpoints.random import published, tiny

    return getattr(published if hasattr(published, name) else tiny, name)
