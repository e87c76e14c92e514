"""The second lesson: what is trained moves, what is not stays, and answers are judged one by one."""

import io

import pytest
import torch
from rich.console import Console

from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.reader.documents.codes import Split
from lmdeploy_vico.reader.documents.tile import Question
from lmdeploy_vico.reader.initial import begin_language, begin_vision
from lmdeploy_vico.reader.lessons import answering
from lmdeploy_vico.reader.lessons.answering import Answering, Plan, accuracy
from lmdeploy_vico.reader.lessons.material import COMPRESSED, FULL, Material, Seen
from lmdeploy_vico.reader.lessons.talk import Talks
from lmdeploy_vico.training.model.vico_model import VicoModel


@pytest.fixture
def model(reader_config):
    use('torch')
    torch.manual_seed(0)
    made = VicoModel(reader_config).float()
    begin_vision(made.vision_model)
    begin_language(made.language_model, made.mlp1, made.mlp2)
    for value in (*made.pooling_before_gating.parameters(), *made.gating.parameters()):
        torch.nn.init.zeros_(value)  # nothing uninitialised, which may be no number
    return made.requires_grad_(False)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for name, value in {'EXCERPTS': 3, 'TILES': 2, 'NEW_TILES': 1, 'PAGES': 1}.items():
        monkeypatch.setattr(answering, name, value)


def moved(model, before):
    """The parts of which something has changed."""
    return {
        name.partition('.')[0]
        for name, value in model.named_parameters()
        if not torch.equal(value.detach(), before[name])
    }


def lesson(model, projector, ratio, tokenizer):
    material = Material(model, 1, ratio)
    return Answering(model, projector, Talks(tokenizer), material, Console(file=io.StringIO()))


def test_projector_and_language_model_learn(model, reader_tokenizer):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    lesson(model, model.mlp1, FULL, reader_tokenizer).teach(Plan(1, 1, 1))
    assert moved(model, before) == {'mlp1', 'language_model'}


def test_the_other_projector_learns_alone(model, reader_tokenizer):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    lesson(model, model.mlp2, COMPRESSED, reader_tokenizer).teach_projector(2)
    assert moved(model, before) == {'mlp2'}


@pytest.mark.long
def test_a_tile_is_learnt_by_heart(model, reader_tokenizer, monkeypatch):
    """Thirty steps on one and the same tile: the loss falls, through projector and language model."""
    [seen] = Material(model, 2).tiles(['fine'])
    monkeypatch.setattr(Material, 'tiles', lambda self, kinds: [seen])
    output = io.StringIO()
    material = Material(model, 1)
    taught = Answering(model, model.mlp1, Talks(reader_tokenizer), material, Console(file=output, width=200))
    taught.teach(Plan(0, 30, 0))
    [line] = [line for line in output.getvalue().splitlines() if line.startswith('answering')]
    loss = float(line.partition('tiles/loss ')[2].split()[0])
    assert loss < 5, 'the running mean; it begins with 6.9, the logarithm of the vocabulary'


def test_accuracy_asks_each_question_alone(model, reader_tokenizer, monkeypatch):
    asked = []

    class Said:
        def __init__(self, talks):
            asked.extend(len(talk.answers) for talk in talks)
            self.count = len(talks)

        def right(self):
            return torch.tensor([True] * (self.count - 1) + [False])

    monkeypatch.setattr(answering, 'answer', lambda model, talks, visual: Said(talks))
    questions = [Question(f'Code of {key}?', '1234', 'fine') for key in 'ABCD'] + [
        Question('Which shape?', 'circle', 'shape')
    ]
    seen = Seen(torch.randn(256, 256), None, [256], questions)
    found = accuracy(model, model.mlp1, Talks(reader_tokenizer), [seen], at_once=3)
    assert found == {'fine': (3, 4), 'shape': (0, 1)} and asked == [1] * 5


def test_withheld_codes_are_for_judging(model):
    train, test = (Material(model, 3, FULL, split).tiles(['fine'])[0] for split in (Split.TRAIN, Split.TEST))
    assert {one.answer for one in train.questions}.isdisjoint({one.answer for one in test.questions})
