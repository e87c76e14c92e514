"""How a command fails."""


class CommandError(Exception):
    """The command cannot do what it was asked for; the message says why, and is all that the user sees."""
