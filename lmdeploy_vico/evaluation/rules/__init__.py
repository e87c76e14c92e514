"""How answers are judged, and how a data set's score comes of it. One rule a data set; see :data:`RULES`.

A rule gives points to each answer. A score is computed from sums of statistics over the questions, so that it can be
computed again for any sample of them, which is what its interval is made of.
"""

import re
from collections.abc import Sequence

from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.choice import MultipleChoice
from lmdeploy_vico.evaluation.rules.rule import Rule
from lmdeploy_vico.evaluation.rules.text import Anls, Contains, ExactMatch, RelaxedAccuracy
from lmdeploy_vico.evaluation.rules.vqa import VqaScore
from lmdeploy_vico.evaluation.rules.yes_no import Mme, Pope

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (ExactMatch(), MultipleChoice(), RelaxedAccuracy(), Anls(), VqaScore(), Contains(), Pope(), Mme())
}

# The data sets of the paper and their like, by how VLMEvalKit's files are called.
KNOWN = {
    r'^(ChartQA|PlotQA)(?!_?Pro)': RelaxedAccuracy.name,
    r'^(DocVQA|InfoVQA|InfographicVQA|ST-?VQA)': Anls.name,
    r'^(TextVQA|VQAv2|OKVQA|VizWiz)': VqaScore.name,
    r'^OCRBench(?!_?v2)': Contains.name,
    r'^POPE': Pope.name,
    r'^MME($|_(?!RealWorld))': Mme.name,
}


def choose(name: str, questions: Sequence[Question]) -> Rule:
    """The rule of a data set: by its known name, or multiple choice where there are choices, or exact match."""
    for pattern, rule in KNOWN.items():
        if re.match(pattern, name, re.IGNORECASE):
            return RULES[rule]
    return RULES[MultipleChoice.name if all(question.choices for question in questions) else ExactMatch.name]


def named(name: str) -> Rule:
    """The rule of that name; raises :class:`EvaluationError` if there is none."""
    try:
        return RULES[name]
    except KeyError:
        raise EvaluationError(f'{name!r} is not a rule; the rules are {", ".join(RULES)}.') from None
