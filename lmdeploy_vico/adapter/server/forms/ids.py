"""Token ids with images, where LMDeploy puts the ids into a message that a client could have written."""

from typing import Any


class TokenIds(list[int]):
    """The ``input_ids`` of a request, as opposed to a list that a client wrote where a text belongs.

    LMDeploy turns a chat request with ``input_ids`` and ``image_data`` into a message whose text is the list of ids,
    and would render it with the chat template.
    """


def mark_ids(request: Any) -> None:
    """Have the ids of a parsed request known again in the message that LMDeploy makes of them."""
    if request.input_ids is not None:
        request.input_ids = TokenIds(request.input_ids)


def stand_for_ids(messages: Any) -> bool:
    """Return whether LMDeploy made these messages of ids and images: they are no conversation, and have no template."""
    try:
        return isinstance(messages[0]['content'][0]['text'], TokenIds)
    except (IndexError, KeyError, TypeError):
        return False
