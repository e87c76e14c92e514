"""The seconds of a prefill step: against counts made elsewhere, and against sums by hand."""

import pytest

from benchmarks.gates.targets import prefill_flop
from lmdeploy_vico.checkpoints.random.published import config_of
from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.planning import PlanningError, constants
from lmdeploy_vico.planning.constants import Fitted
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.language import (
    LanguageModel,
    Piece,
    active_weights,
    model_of,
    pieces,
    stored_weights,
)
from lmdeploy_vico.training.cost.shapes import Shapes

NOTHING = Fitted(0.0)


def whole(tokens):
    return Piece(0.0, tokens, last=True)


@pytest.mark.parametrize('name', MODELS)
def test_weights_are_those_that_training_counts(name):
    shapes = Shapes.of(config_of(name))
    assert active_weights(name) == shapes.active
    llm, size = shapes.parameters['language'], MODELS[name].size
    assert stored_weights(name) == llm - MODELS[name].vocab_size * size.hidden - size.hidden, (
        'no embedding, no last norm'
    )


@pytest.mark.parametrize('name', MODELS)
def test_flop_are_those_of_the_gates(name, monkeypatch):
    """Where products and attention reach the peak, seconds are FLOP by peak; the gates leave out norms and the head."""
    monkeypatch.setattr(constants, 'PRODUCTS', 1.0)
    monkeypatch.setattr(constants, 'ATTENTION', 1.0)
    model, gpu = LanguageModel(name, GPUS['H100'], 1, NOTHING), GPUS['H100']
    size, tokens = MODELS[name].size, 2637.0
    head = 2 * size.hidden * MODELS[name].vocab_size
    assert model.compute_seconds([whole(tokens)]) * gpu.flops - head == pytest.approx(
        prefill_flop(size, tokens), rel=5e-4
    )


def test_attention_is_dearer_in_a_longer_prompt_and_shared_by_ranks():
    one, four = (LanguageModel('8B', GPUS['H200'], tp, NOTHING) for tp in (1, 4))
    assert one.compute_seconds([whole(4000)]) > 2 * one.compute_seconds([whole(2000)]) * 1.01
    assert one.compute_seconds([whole(4000)]) == pytest.approx(4 * four.compute_seconds([whole(4000)]))


def test_no_step_is_shorter_than_reading_the_weights():
    model, gpu = LanguageModel('30B-A3B', GPUS['H200'], 1, NOTHING), GPUS['H200']
    read = 2 * stored_weights('30B-A3B') / (gpu.bandwidth * constants.BANDWIDTH)
    assert model.step_seconds([whole(50)]) == pytest.approx(read)
    assert model.step_seconds([whole(8000)]) == model.compute_seconds([whole(8000)]) > read


def test_all_reduces_by_hand():
    """Two a layer; in a ring each of 8 GPUs sends 7/4 of the 2000 x 4096 values of two bytes."""
    model = LanguageModel('241B', GPUS['H200'], 8, NOTHING)
    once = 20e-6 + 7 / 4 * 2000 * 4096 * 2 / 370e9
    assert model.all_reduce_seconds(2000) == pytest.approx(2 * 94 * once)
    alone = LanguageModel('241B', GPUS['H200'], 1, NOTHING)
    assert alone.all_reduce_seconds(2000) == 0
    step = [whole(2000)]
    assert model.step_seconds(step) == pytest.approx(model.compute_seconds(step) + model.all_reduce_seconds(2000))


def test_every_prompt_of_a_step_costs_its_fitted_time():
    fitted = Fitted(1e-3, {'30B-A3B': 2e-3})
    for name, seconds in (('8B', 1e-3), ('30B-A3B', 3e-3)):
        with_it, without = (LanguageModel(name, GPUS['H200'], 1, times) for times in (fitted, NOTHING))
        step = [whole(2000)] * 3
        assert with_it.step_seconds(step) - without.step_seconds(step) == pytest.approx(3 * seconds)


def test_chunks_are_the_prompt():
    cut = list(pieces(20000, 8192))
    assert [(piece.start, piece.end, piece.last) for piece in cut] == [
        (0, 8192, False),
        (8192, 16384, False),
        (16384, 20000, True),
    ]
    assert list(pieces(8192, 8192)) == [whole(8192)]
    model = LanguageModel('8B', GPUS['H200'], 1)
    assert sum(model.compute_seconds([piece]) for piece in cut) == pytest.approx(model.compute_seconds([whole(20000)]))
    assert model.request_seconds(20000) == pytest.approx(sum(model.step_seconds([piece]) for piece in cut))


def test_a_full_step_holds_as_many_prompts_as_fit():
    model = LanguageModel('241B', GPUS['H200'], 8)
    assert model.request_seconds(2637) == pytest.approx(model.step_seconds([whole(2637)] * 3) / 3)
    mixed = (0.4 * model.step_seconds([whole(2637)]) + 0.6 * model.step_seconds([whole(2637)] * 2)) / 1.6
    assert model.request_seconds(2637, most=1.6) == pytest.approx(mixed), 'a step of 1 and one of 2 in turn'
    assert model.request_seconds(2637, most=2) == pytest.approx(model.step_seconds([whole(2637)] * 2) / 2)


def test_models_are_found_by_the_papers_names_too():
    assert [model_of(name) for name in ('8B', '241b', '30B', '30b-a3b')] == ['8B', '241B', '30B-A3B', '30B-A3B']
    for name in ('9B', 'A3B', '30', ''):
        with pytest.raises(PlanningError, match=rf'--model {name} is not known: it takes 1B, .*, 241B\.'):
            model_of(name)
