"""``usage.prompt_tokens_details.image_tokens``: how many of a prompt's tokens are visual.

The field is added to LMDeploy's class by ``adapter/patches/server.py``.
"""

from collections.abc import Sequence

from lmdeploy_vico.adapter.handover import Span
from lmdeploy_vico.adapter.server.served import served_request

FIELD = 'image_tokens'


def count_image_tokens(spans: Sequence[Span]) -> None:
    """Note how many visual tokens the prompt of the request that is served has."""
    request = served_request()
    if request is not None:
        request.image_tokens = sum(map(len, spans))


def served_image_tokens() -> int:
    """The visual tokens of the prompt of the request that is being served; 0 outside a request."""
    request = served_request()
    return 0 if request is None else request.image_tokens
