"""The last line of defence for what clients are told: no message is long, and none names classes of the server."""

import re
from typing import Any

from lmdeploy_vico.wording import shortened

# pydantic names the alternatives of a union in the place of an error: classes, types and schemas of ours.
_OF_A_CLIENT = re.compile(r'[a-z0-9_]{1,40}')
_TYPES = {'str', 'int', 'float', 'bool', 'none', 'list', 'dict', 'constrained'}


def plain_location(error: Any) -> Any:
    """An error of a request's validation whose place is given by the request's own keys and numbers only."""
    if not isinstance(error, dict):
        return error
    kept = [part for part in error.get('loc', ()) if isinstance(part, int) or _is_key(part)]
    return {'loc': tuple(kept), 'msg': shortened(str(error.get('msg', '')))}


def _is_key(part: Any) -> bool:
    return isinstance(part, str) and part not in _TYPES and _OF_A_CLIENT.fullmatch(part) is not None
