"""Conversations: the tokens that training and serving have, and answers that are right as a whole."""

import torch

from lmdeploy_vico.reader.documents.tile import Question
from lmdeploy_vico.reader.initial import begin_language
from lmdeploy_vico.reader.lessons.talk import Answers, Talks, answer
from lmdeploy_vico.training.data.conversation import render
from lmdeploy_vico.training.data.records import Turn
from lmdeploy_vico.training.model.vico_model import VicoModel

QUESTIONS = [
    Question('Code of A?', '1234', 'fine'),
    Question('Which shape?', 'circle', 'shape'),
    Question('Code of H?', '0071', 'medium'),
]


def turns(pictures):
    shown = '<image>\n' * pictures
    found = []
    for number, question in enumerate(QUESTIONS):
        found += [Turn('user', (shown if number == 0 else '') + question.text), Turn('assistant', question.answer)]
    return found


def test_tokens_are_those_of_the_chat_template(reader_tokenizer):
    for counts in ([3], [2, 5], [1, 1, 1]):
        talk = Talks(reader_tokenizer).make(counts, QUESTIONS)
        ids, response, left = [], [], iter(counts)
        for piece in render(reader_tokenizer, turns(len(counts)), 'here'):
            encoded = reader_tokenizer.encode(piece.text, add_special_tokens=False)
            blank = next(left) if piece.image else 0
            ids += [*encoded, *[0] * blank]
            response += [*[piece.response] * len(encoded), *[False] * blank]
        assert (talk.ids, talk.response) == (ids, response)
        assert sum(talk.visual) == sum(counts)
        assert talk.answers == [5, 2, 5]


def test_words_are_one_token_each(reader_tokenizer):
    for text, count in (('Code of A?', 4), ('Which photograph?', 3), ('astronaut', 1), ('4711', 4)):
        assert len(reader_tokenizer.encode(text, add_special_tokens=False)) == count


def test_an_answer_is_right_as_a_whole():
    wanted = torch.tensor([1, 2, 3, 4])
    logits = torch.eye(5)[torch.tensor([1, 2, 3, 0])]
    answers = Answers(logits, wanted, [2, 2])
    assert answers.right().tolist() == [True, False]
    assert torch.isclose(answers.loss(), torch.nn.functional.cross_entropy(logits, wanted))


def test_padding_and_company_change_nothing(reader_config, reader_tokenizer):
    torch.manual_seed(0)
    model = VicoModel(reader_config).float()
    begin_language(model.language_model, model.mlp1)
    talks = Talks(reader_tokenizer)
    visual = torch.randn(9, 128)
    made = [talks.make([4], QUESTIONS[:1]), talks.make([5], QUESTIONS)]
    with torch.no_grad():
        together = answer(model, made, visual)
        alone = [answer(model, [one], part) for one, part in zip(made, visual.split([4, 5]), strict=True)]
    assert torch.allclose(together.logits, torch.cat([each.logits for each in alone]), atol=1e-5)
    assert torch.equal(together.wanted, torch.cat([each.wanted for each in alone]))
