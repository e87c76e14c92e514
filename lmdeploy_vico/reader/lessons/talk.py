"""Conversations about pictures as token ids, as they are served and trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy_vico.reader.documents.tile import Question
from lmdeploy_vico.training.model.vico_model import VicoModel

BEGIN = '<|im_start|>user\n'
PICTURE, PICTURE_END = '<img>', '</img>\n'
ANSWER = '<|im_end|>\n<|im_start|>assistant\n'
END = '<|im_end|>'


@dataclass(frozen=True)
class Talk:
    """A conversation, with room for visual tokens.

    Attributes:
        ids: 0 where visual tokens stand.
        visual: where they do.
        response: which tokens are answers.
        answers: how many tokens each answer has.
    """

    ids: list[int]
    visual: list[bool]
    response: list[bool]
    answers: list[int]


class Talks:
    """Lays out conversations.

    Args:
        tokenizer: the reader's, of ``transformers``.
    """

    def __init__(self, tokenizer: Any) -> None:
        @cache
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        self._encode = encode

    def make(self, pictures: Sequence[int], questions: Sequence[Question]) -> Talk:
        """Show pictures of so many visual tokens each, and ask one question after another."""
        talk = Talk([], [], [], [])
        text = BEGIN
        for count in pictures:
            self._add(talk, self._encode(text + PICTURE))
            self._add(talk, [0] * count, visual=True)
            text = PICTURE_END
        for question in questions:
            self._add(talk, self._encode(text + question.text + ANSWER))
            # A code is streamed, so that there is no end of texts: its tokens are its digits.
            answer = [token for piece in self._pieces(question.answer) for token in self._encode(piece)]
            self._add(talk, answer, response=True)
            talk.answers.append(len(answer))
            text = '\n' + BEGIN
        return talk

    @staticmethod
    def _pieces(answer: str) -> list[str]:
        return [*(answer if answer.isdigit() else [answer]), END]

    @staticmethod
    def _add(talk: Talk, ids: Sequence[int], visual: bool = False, response: bool = False) -> None:
        talk.ids.extend(ids)
        talk.visual.extend([visual] * len(ids))
        talk.response.extend([response] * len(ids))


@dataclass(frozen=True)
class Answers:
    """What a model says where answers stand.

    Attributes:
        logits: float32 ``[N, V]``.
        wanted: int64 ``[N]``, the right tokens.
        counts: tokens of each answer, in order.
    """

    logits: Tensor
    wanted: Tensor
    counts: Sequence[int]

    def loss(self) -> Tensor:
        """The cross-entropy of all tokens."""
        return F.cross_entropy(self.logits, self.wanted)

    def right(self) -> Tensor:
        """Whether each answer is given as a whole, by a model that always takes the likeliest token."""
        tokens = self.logits.argmax(1) == self.wanted
        return torch.stack([part.all() for part in tokens.split(list(self.counts))])


def answer(model: VicoModel, talks: Sequence[Talk], visual: Tensor) -> Answers:
    """Have the language model answer.

    Args:
        model: its language model is used.
        talks: conversations.
        visual: the visual tokens ``[n, H]`` of one after another.
    """
    length = max(len(talk.ids) for talk in talks)
    # Padding at the end needs no mask: attention is causal.
    ids, places, response = (
        torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        for rows in zip(*((talk.ids, talk.visual, talk.response) for talk in talks), strict=True)
    )
    embedded = model.language_model.model.embed_tokens(ids)
    embedded = embedded.masked_scatter(places.bool()[..., None], visual)
    hidden = model.language_model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    wanted = response.bool()
    logits = model.language_model.lm_head(hidden[:, :-1][wanted[:, 1:]])
    return Answers(logits, ids[wanted], [count for talk in talks for count in talk.answers])
