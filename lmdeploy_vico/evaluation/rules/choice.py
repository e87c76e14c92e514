"""The rule for questions with choices: which letter, or which of the texts, an answer names."""

import re

from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.rule import Rule
from lmdeploy_vico.evaluation.rules.text import plain

MARKED = r'(?i:answer|option|choice)\s*(?:is)?\s*:?\s*[(\["\'*]*([A-Z])\b'
# A capital letter by itself; but "A" may begin a sentence, and "I" may be who speaks.
ALONE = r'(?<![\w\'])([B-HJ-Z]|[AI](?!\s+[a-z])|(?<=[a-z] )A)(?![\w\'])'


class MultipleChoice(Rule):
    """Right if the right choice is named, and no other: by its letter, or else by its text."""

    name = 'choice'
    instruction = 'Answer with the letter of the right choice only.'

    def points(self, question: Question, said: str) -> float:
        """1 if it is."""
        return float(chosen(question, said) == question.answer.strip().upper())


def chosen(question: Question, said: str) -> str | None:
    """The letter of the choice that an answer names; None if it names none, or several."""
    choices = question.choices or {}
    said = said.strip()
    bare = re.fullmatch(r'[(\[]?([A-Za-z])[)\].:]?', said)
    if bare and bare[1].upper() in choices:
        return bare[1].upper()
    led = re.match(r'[(\[]?([A-Z])[)\].:](?=\s|$)', said)
    if led and led[1] in choices:
        return led[1]
    whole = {letter for letter, text in choices.items() if plain(text) == plain(said) != ''}
    marked = {letter for letter in re.findall(MARKED, said) if letter in choices}
    alone = {letter for letter in re.findall(ALONE, said) if letter in choices}
    texts = {letter for letter, text in choices.items() if text.strip() and _says(said, text)}
    for named in (whole, marked, alone, texts):
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _says(said: str, text: str) -> bool:
    return re.search(rf'(?<!\w){re.escape(plain(text))}(?!\w)', plain(said)) is not None
