"""The loop's schedule, and which parameters are decayed."""

import pytest

from lmdeploy_vico.training.loop.steps import Schedule, is_decayed


def test_the_first_step_of_a_rise_trains():
    schedule = Schedule(steps=9, batch=1, rate=4.0, least_rate=1.0, rise=4)
    rates = [4.0 * schedule.share_of_rate(done) for done in range(9)]
    assert rates[:5] == [1.0, 2.0, 3.0, 4.0, 4.0], 'the cosine begins at the top'
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 4.0 * schedule.share_of_rate(9) == 1.0


def test_without_a_rise_the_first_step_has_the_whole_rate():
    assert Schedule(steps=2, batch=1, rate=4.0, least_rate=1.0).share_of_rate(0) == 1.0
    assert Schedule(steps=1, batch=1, rate=4.0, least_rate=1.0, rise=1).share_of_rate(0) == 1.0


@pytest.mark.parametrize('kept', ['class_embedding', 'position_embedding', 'query_token'])
def test_tokens_and_positions_of_the_vision_side_are_not_decayed(dense, kept):
    names = [name for name, parameter in dense.model().named_parameters() if name.endswith(kept)]
    assert len(names) == 1
    parameters = dict(dense.model().named_parameters())
    assert parameters[names[0]].dim() > 1 and not is_decayed(names[0], parameters[names[0]])


def test_matrices_are_decayed_and_vectors_are_not(dense):
    decayed = {name for name, parameter in dense.model().named_parameters() if is_decayed(name, parameter)}
    assert {'language_model.model.embed_tokens.weight', 'mlp2.1.weight', 'language_model.lm_head.weight'} <= decayed
    assert not [name for name in decayed if name.endswith('bias') or 'norm' in name]
