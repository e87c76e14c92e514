"""The VQA score: how many of ten people gave the same answer."""

import re

from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.rule import Rule

NUMBERS = {
    'none': '0', 'zero': '0', 'one': '1', 'two': '2', 'three': '3', 'four': '4', 'five': '5', 'six': '6',
    'seven': '7', 'eight': '8', 'nine': '9', 'ten': '10',
}  # fmt: skip
ARTICLES = {'a', 'an', 'the'}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Of the published list, without those that it does not change.
CONTRACTIONS = [
    "ain't", "aren't", "can't", "could've", "couldn't", "didn't", "doesn't", "don't", "hadn't", "hasn't", "haven't",
    "he'd", "he's", "how'd", "how'll", "how's", "isn't", "it'd", "it'll", "ma'am", "mightn't",
    "might've", "mustn't", "must've", "needn't", "not've", "o'clock", "oughtn't", "shan't", "she'd've", "should've",
    "shouldn't", "somebody'd", "somebody'll", "somebody's", "someone'd", "someone'll", "someone's", "something'd",
    "something'll", "that's", "there'd", "there're", "there's", "they'd", "they'll", "they're", "they've", "'twas",
    "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd",
    "where's", "where've", "who'd", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've",
    "wouldn't", "y'all", "you'd", "you'll", "you're", "you've", "couldn't've", "he'd've", "hadn't've", "'ow's'at",
    "it'd've", "mightn't've", "shouldn't've", "somebody'd've", "someone'd've", "something'd've", "there'd've",
    "they'd've", "who'd've", "wouldn't've", "you'd've", "y'all'll", "y'all'd've",
]  # fmt: skip
TOLD = 3  # people with the same answer make it fully right


# As published, a word is restored if it lacks one of its apostrophes.
RESTORED = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTIONS for place, mark in enumerate(word) if mark == "'"
}


def normalised(answer: str) -> str:
    """An answer as it is compared (Antol et al. 2015): without punctuation, articles and number words."""
    given = answer = ' '.join(answer.lower().split())
    has_number_with_commas = re.search(r'\d,\d', given) is not None
    for mark in PUNCTUATION:
        at_an_edge = f'{mark} ' in given or f' {mark}' in given
        answer = answer.replace(mark, '' if at_an_edge or has_number_with_commas else ' ')
    answer = re.sub(r'\.(?!\d)', '', answer)
    words = [NUMBERS.get(word, word) for word in answer.split()]
    return ' '.join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


class VqaScore(Rule):
    """The share of three people who gave the same answer, over all ways to leave one of the ten out.

    With fewer than three answers, each is right.
    """

    name = 'vqa'

    def points(self, question: Question, said: str) -> float:
        """The score of the answer."""
        people = [normalised(answer) for answer in question.answers]
        same = sum(person == normalised(said) for person in people)
        if len(people) < TOLD:
            return float(same > 0)
        others = [same - (person == normalised(said)) for person in people]
        return sum(min(1.0, count / TOLD) for count in others) / len(others)
