"""How messages for clients repeat what a client sent: never at length."""

from collections.abc import Iterable
from itertools import islice

SHOWN = 80  # characters of a value
ENTRIES = 4  # of a list or an object
LONGEST = 1000  # characters of a message


def shown(value: object) -> str:
    """A value in a message: its ``repr``, or the beginning of it.

    Only the beginning of a long text, which may be a picture, is ever written out, and nothing that is nested deeply.
    """
    if isinstance(value, dict):
        pairs = (f'{_shown(key)}: {_shown(each)}' for key, each in islice(value.items(), ENTRIES))
        return _enclosed('{', pairs, len(value), '}')
    if isinstance(value, list | tuple):
        return _enclosed('[', (_shown(each) for each in islice(value, ENTRIES)), len(value), ']')
    return _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return ('{...}' if isinstance(value, dict) else '[...]') if value else repr(value)
    if isinstance(value, str | bytes) and len(value) > SHOWN:
        return f'{value[:SHOWN]!r}... ({len(value)} {"bytes" if isinstance(value, bytes) else "characters"})'
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f'an integer of {value.bit_length()} bits'  # Python refuses to write very large ones
    return shortened(repr(value), SHOWN * 2)


def _enclosed(start: str, entries: Iterable[str], count: int, end: str) -> str:
    return f'{start}{", ".join(entries)}{", ..." if count > ENTRIES else ""}{end}'


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it has more than about ``longest`` characters; it can always be encoded."""
    if len(text) > longest:
        text = f'{text[: longest * 3 // 4]} ... {text[-longest // 4 :]}'
    return text.encode('utf-8', 'replace').decode()
