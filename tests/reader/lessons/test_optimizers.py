"""Schedules and optimisers of the lessons."""

import pytest
import torch
from torch import nn

from lmdeploy_vico.reader.lessons.optimizers import LEAST, Optimizers, Rates, Schedule


def test_rates_rise_stay_and_fall():
    schedule = Schedule(100, rise=10, falls=0.6)
    factors = [schedule.at(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:60] == [1.0] * 51
    assert factors[60:] == sorted(factors[60:], reverse=True) and factors[80] == pytest.approx(0.5)
    assert min(factors[60:]) == pytest.approx(LEAST)


def test_every_parameter_learns_once_and_at_its_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    layer = id(model[0].weight)
    rates = Rates(0.1, 0.01, {'1.bias': 0.0}, (0.9, 0.95))
    optimizers = Optimizers(model.named_parameters(), lambda value: id(value) == layer, rates, Schedule(10, 1, 0.9))
    optimizers.step(0, model(torch.randn(8, 4)).square().mean())
    moved = {name: (value - before[name]).abs().max().item() for name, value in model.named_parameters()}
    assert moved['1.bias'] == 0 and moved['1.weight'] == pytest.approx(0.01, rel=1e-3)  # AdamW's first step is its rate
    assert 0.01 < moved['0.weight'] < 0.2
