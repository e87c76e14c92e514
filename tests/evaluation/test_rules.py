"""Each rule on cases made by hand, with what its publication says they are worth."""

import numpy as np
import pytest

from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules import RULES, choose, named
from lmdeploy_vico.evaluation.rules.vqa import normalised


def question(answer, index='1', **fields):
    return Question(index=index, text='?', answer=answer, **fields)


def points(rule, answer, said, **fields):
    return RULES[rule].points(question(answer, **fields), said)


def score(rule, questions, said):
    return float(RULES[rule].score(RULES[rule].statistics(questions, said).sum(0)))


@pytest.mark.parametrize(
    'answer, said, worth',
    [('Paris', 'paris', 1), ('Paris', ' Paris.\n', 1), ("['12', 'twelve']", 'Twelve', 1), ('Paris', 'in Paris', 0)],
)
def test_exact(answer, said, worth):
    assert points('exact', answer, said) == worth


@pytest.mark.parametrize(
    'answer, said, worth',
    [
        ('100', '105', 1),
        ('100', '95', 1),
        ('100', '105.1', 0),
        ('-4', '-4.1', 1),
        ('-4', '4', 0),
        ('14%', '0.14', 1),
        ('0.14', '14.5%', 1),
        ('1,000', '1000', 0),  # as published, digits with commas are a text
        ('1,000', '1,000', 1),
        ('12', '12.', 1),
        ('Blue', 'Blue.', 0),
        ('0', '0', 1),
        ('0', '0.0001', 0),
        ('2019', 'the year 2019', 0),
        ('Blue', 'blue', 1),
        ('Blue', 'bluish', 0),
        ('5', 'inf', 0),
    ],
)
def test_relaxed_accuracy(answer, said, worth):
    assert points('relaxed', answer, said) == worth


@pytest.mark.parametrize(
    'answer, said, worth',
    [
        ('abcde', 'abcde', 1),
        ('abcde', 'ABCDE', 1),
        ('abcd', 'abcx', 0.75),
        ('abcd', 'abxx', 0),  # half of the characters differ
        ('abcd', '', 0),
        ("['abcd', 'xyzw']", 'xyzv', 0.75),  # the nearest
        ('17 May  2003', '17 may 2003', 1),
    ],
)
def test_anls(answer, said, worth):
    assert points('anls', answer, said) == pytest.approx(worth)


@pytest.mark.parametrize('same, worth', [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_score(same, worth):
    """Over the ten ways to leave one person out, as the evaluation of VQA v2 and TextVQA does."""
    people = ['pepsi'] * same + [f'other {number}' for number in range(10 - same)]
    assert points('vqa', str(people), 'Pepsi') == pytest.approx(worth)


@pytest.mark.parametrize(
    'said, meant',
    [
        ('The cat.', 'cat'),
        ('Two dogs', '2 dogs'),
        ('none', '0'),
        ('dont', "don't"),
        ("shouldnt've", "shouldn't've"),
        ('shouldntve', 'shouldntve'),
        ('its', 'its'),
        ('lets', 'lets'),
        ('1,000', '1000'),
        ('red/blue', 'red blue'),
        ('red / blue-green', 'red blue green'),
        ('a;/b c/d', 'b c d'),
        ('3.50', '3.50'),
        ('yes, it is!', 'yes it is'),
    ],
)
def test_vqa_answers_are_compared_without_form(said, meant):
    assert normalised(said) == meant


def test_ocrbench():
    assert points('contains', "['Hello World']", 'It says: hello world!') == 1
    assert points('contains', "['Hello World']", 'hello\nworld') == 1
    assert points('contains', "['Hello World']", 'helloworld') == 0
    formula = {'category': 'Handwritten Mathematical Expression Recognition'}
    assert points('contains', "['x ^ 2']", 'f = x^2', **formula) == 1
    assert points('contains', "['x ^ 2']", 'f = X^2', **formula) == 0
    assert score('contains', [question('a'), question('b', '2')], ['a', 'x']) == 500


CHOICES = {'A': 'a red car', 'B': 'a blue car', 'C': 'a car', 'D': '42'}


@pytest.mark.parametrize(
    'said, letter',
    [
        ('B', 'B'),
        ('b', 'B'),
        ('(B)', 'B'),
        ('B.', 'B'),
        ('B. a blue car', 'B'),
        ('The answer is B', 'B'),
        ('Answer: (C)', 'C'),
        ('It is a blue car.', 'B'),
        ('The answer is: A', 'A'),
        ('**A**', 'A'),
        ('A, because it is red', 'A'),
        ('I choose A because it is red', 'A'),
        ('The answer is A because it is red', 'A'),
        ('A blue car', 'B'),
        ('a car', 'C'),
        ('A blue car and a red car', None),
        ('I think D', 'D'),
        ('42', 'D'),
        ('B or C', None),
        ('E', None),
        ('', None),
    ],
)
def test_multiple_choice(said, letter):
    for one in CHOICES:
        assert points('choice', one, said, choices=CHOICES) == (one == letter)


def test_a_choice_that_stands_in_another():
    choices = {'A': 'car', 'B': 'red car'}
    assert points('choice', 'B', 'Red car.', choices=choices) == 1
    assert points('choice', 'A', 'red car', choices=choices) == 0
    assert points('choice', 'B', 'It is a red car.', choices=choices) == 0  # or is it the first?


def test_pope():
    wanted = ['Yes'] * 3 + ['No'] * 3
    said = ['Yes, there is', 'no', 'yes', 'yes', 'No.', 'maybe']
    questions = [question(answer, str(index)) for index, answer in enumerate(wanted)]
    assert score('pope', questions, said) == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    assert score('pope', questions, ['no'] * 6) == 0
    assert points('pope', 'No', 'yes or no') == 0


def test_questions_of_pope_count_once_for_each_of_their_sets():
    questions = [
        question('Yes', '1', category='adversarial,popular,random'),
        question('Yes', '2', category='random'),
        question('No', '3', category='popular'),
    ]
    assert RULES['pope'].categories(questions[0]) == ['adversarial', 'popular', 'random']
    assert score('pope', questions, ['yes', 'no', 'yes']) == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 1))


def test_mme():
    """Of two pictures of a category, one has both answers right and one has one: 75 % and 50 %."""
    questions = [
        question(answer, f'{category}{number}', category=category, group=f'{category}{number // 2}')
        for category in ('color', 'count')
        for number, answer in enumerate(['Yes', 'No', 'Yes', 'No'])
    ]
    said = ['yes', 'no', 'yes', 'yes', *['yes', 'no', 'yes', 'no']]
    assert score('mme', questions[:4], said[:4]) == 125
    assert score('mme', questions, said) == 125 + 200
    assert RULES['mme'].statistics(questions, said).shape == (4, 8)


def test_all_of_mme_is_2800():
    categories = [f'category {number}' for number in range(14)]
    questions = [
        question('Yes', f'{name}{number}', category=name, group=str(number // 2))
        for name in categories
        for number in range(4)
    ]
    assert score('mme', questions, ['yes'] * len(questions)) == 2800


@pytest.mark.parametrize(
    'name, rule',
    [
        ('ChartQA_TEST', 'relaxed'),
        ('DocVQA_VAL', 'anls'),
        ('InfoVQA_VAL', 'anls'),
        ('TextVQA_VAL', 'vqa'),
        ('OCRBench', 'contains'),
        ('POPE', 'pope'),
        ('MME', 'mme'),
        ('MME_RealWorld', 'exact'),
        ('MME-RealWorld', 'exact'),
        ('OCRBench_v2', 'exact'),
        ('ChartQAPro', 'exact'),
        ('mine', 'exact'),
    ],
)
def test_known_data_sets(name, rule):
    assert choose(name, [question('a')]).name == rule


def test_data_sets_with_choices():
    assert choose('MMBench_DEV_EN', [question('A', choices=CHOICES)]).name == 'choice'
    assert named('anls') is RULES['anls']
    with pytest.raises(EvaluationError, match='is not a rule; the rules are exact, choice'):
        named('nothing')


@pytest.mark.parametrize('rule', RULES.values(), ids=RULES)
def test_scores_of_many_samples_at_once(rule):
    questions = [question('yes', str(n), category=str(n % 2), choices={'A': 'yes'}) for n in range(6)]
    statistics = rule.statistics(questions, ['yes', 'no'] * 3)
    drawn = np.stack([np.ones(len(statistics)), np.arange(len(statistics))])
    many = rule.score(drawn @ statistics)
    assert many.shape == (2,)
    assert many[0] == pytest.approx(rule.score(statistics.sum(0)))
