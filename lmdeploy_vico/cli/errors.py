"""How a command fails."""

from pathlib import Path


class CommandError(Exception):
    """The command cannot do what it was asked for; the message says why, and is all that the user sees."""


def require_checkpoint(path: Path) -> None:
    """Raise :class:`CommandError` unless a path is a checkpoint's directory."""
    if not (path / 'config.json').is_file():
        raise CommandError(f'{path} is not a checkpoint directory: it holds no config.json')
