"""A conversation as the server renders it, cut where images stand and where responses begin and end."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_vico.training.data.records import IMAGE, DataError, Turn

IMAGE_START, IMAGE_END = '<img>', '</img>'
IMAGE_CONTEXT = '<IMG_CONTEXT>'


@dataclass(frozen=True)
class Piece:
    """Text between two cuts.

    Attributes:
        text: tokenized by itself.
        response: whether it is what the model is to say: an answer with the token that ends it.
        image: whether an image follows.
    """

    text: str
    response: bool = False
    image: bool = False


def render(tokenizer: Any, turns: Sequence[Turn], place: str) -> list[Piece]:
    """Render a conversation with the checkpoint's chat template.

    As in the server, what the template gets for an image is a random mark, so that no text can be taken for one, and
    text is tokenized in the pieces between images. A response is a piece of its own: it is generated token by token
    after a prompt that has been tokenized.

    Args:
        tokenizer: of ``transformers``, with a chat template.
        turns: of a record.
        place: of the record, for messages.

    Raises:
        DataError: the template changes earlier turns when later ones follow, so that there is no one prompt.
    """
    mark = f'vico-{secrets.token_hex(16)}'
    messages = [{'role': turn.role, 'content': _marked(turn, mark)} for turn in turns]

    def text_of(count: int, ask: bool = False) -> str:
        rendered: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        return rendered

    pieces, end = [], 0
    for index, turn in enumerate(turns):
        if turn.role != 'assistant':
            continue
        asked, answered = text_of(index, ask=True), text_of(index + 1)
        if not answered.startswith(asked) or not text_of(len(turns)).startswith(answered):
            raise DataError(f'{place}: the chat template renders a turn otherwise when others follow it.')
        stop = _end_of_response(answered, len(asked), tokenizer.eos_token)
        pieces += _cut(asked[end:], mark)
        pieces.append(Piece(answered[len(asked) : stop], response=True))
        end = stop
    return pieces


def _marked(turn: Turn, mark: str) -> str:
    return turn.text.replace(IMAGE, f'{IMAGE_START}{mark}{IMAGE_END}') if turn.role == 'user' else turn.text


def _end_of_response(text: str, start: int, eos: str | None) -> int:
    """Where a response that begins at ``start`` ends: after the token that ends it, before what separates turns."""
    found = text.rfind(eos, start) if eos else -1
    return len(text) if found < 0 else found + len(eos or '')


def _cut(text: str, mark: str) -> list[Piece]:
    *before_images, last = text.split(mark)
    return [*(Piece(part, image=True) for part in before_images), Piece(last)]
