"""What a client is told about a generation parameter that cannot be used."""


class ParameterError(ValueError):
    """A request asks for what sampling or scheduling cannot do; LMDeploy answers 400 with the message."""
