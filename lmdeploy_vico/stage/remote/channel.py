"""How a server speaks to encoders elsewhere, whatever carries the messages."""

from collections.abc import Mapping
from typing import Any, Protocol

from lmdeploy_vico.stage.errors import EncoderGoneError

# What an encoder says of itself. A plain mapping, so that any version of the plugin can read any other's.
Hello = Mapping[str, Any]

__all__ = ['Answer', 'Channel', 'Cluster', 'EncoderGoneError', 'Hello']


class Answer(Protocol):
    """What an encoder is going to answer to one call."""

    def ready(self, seconds: float) -> bool:
        """Wait at most so long; return whether :meth:`result` returns or raises at once."""

    def result(self) -> Any:
        """Return the answer.

        Raises:
            EncoderGoneError: the encoder has ended, is just being restarted, or cannot be reached.
            Exception: what the call raised there.
        """


class Channel(Protocol):
    """One encoder, by its name. An encoder that is restarted keeps its channel."""

    @property
    def name(self) -> str:
        """Of the encoder, for log and messages."""

    def call(self, method: str, *arguments: Any) -> Answer:
        """Call a method of the encoder: an :class:`~lmdeploy_vico.stage.remote.service.EncoderService`.

        Calls are answered side by side. Arrays travel without being pickled.
        """


class Cluster(Protocol):
    """Where encoders are found."""

    @property
    def name(self) -> str:
        """As the operator has written it, for log and messages."""

    def find(self) -> list[Channel]:
        """Return the encoders of the server's checkpoint that exist now, ready or not."""

    def others(self) -> list[str]:
        """Return the names of the encoders of other checkpoints."""

    def close(self) -> None:
        """Leave the cluster."""
