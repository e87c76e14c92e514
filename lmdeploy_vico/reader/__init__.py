"""The reader: a model of a few megabytes that answers rightly, and what it is asked about."""


class ReaderError(Exception):
    """The reader cannot be made or written; the message says why."""
