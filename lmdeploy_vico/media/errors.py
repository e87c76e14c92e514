"""What can go wrong with the images and videos of a request.

A message is a sentence for the client. It says nothing of this host, and repeats nothing of what was sent.
"""


class MediaError(ValueError):
    """An image or video that the client has to change: it cannot be fetched or decoded, or is too large."""


class MediaBusyError(RuntimeError):
    """There is no room for an image or video now, beside those of other requests. Later there may be."""
