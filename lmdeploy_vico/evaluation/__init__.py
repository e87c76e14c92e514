"""Data sets asked through a running server, at every compression: an HTTP client without torch or LMDeploy."""


class EvaluationError(Exception):
    """The evaluation cannot be made; the message says what to change."""
