"""What goes wrong on a device, in the form in which a stage reports it."""

import traceback

import torch


class EncodingError(RuntimeError):
    """A device failed twice on a prompt's tiles. The server is at fault, not the request."""


class EncoderGoneError(RuntimeError):
    """An encoder elsewhere has ended or does not answer. What it was given has to be given to another."""


class DeviceStartError(RuntimeError):
    """The worker of ``device`` could not start; ``__cause__`` is the error that stopped it."""

    def __init__(self, device: torch.device | str, error: Exception) -> None:
        super().__init__(f'The vision side cannot start on {device}: {error}')
        self.device = device
        self.__cause__ = error


def encoding_error(error: Exception) -> Exception:
    """Return what a prompt's future raises for a device's ``error``.

    That is an EncodingError. Running out of memory stays what it is: the same request may succeed later.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    wrapped = EncodingError(f'The images could not be encoded: {error}')
    wrapped.__cause__ = error
    return wrapped


def written_out(error: Exception) -> str:
    """Return the error and its traceback as text for the log, and remove the traceback from the error.

    A traceback holds frames, and frames hold tiles. A client, or a tile that has been given up, may keep the error for
    long; the tiles' memory must come back all the same.
    """
    text = ''.join(traceback.format_exception(error))
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return text
