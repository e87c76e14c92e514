"""What a client is told about a generation parameter that cannot be used."""


class ParameterError(ValueError):
    """A request asks for what sampling or scheduling cannot do; LMDeploy answers 400 with the message."""


SHOWN = 40  # characters of a value that a message repeats


def shown(value: object) -> str:
    """A value as a message repeats it, cut to a few characters."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f'an integer of {value.bit_length()} bits'  # Python refuses to write very large ones
    text = repr(value)
    return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'
