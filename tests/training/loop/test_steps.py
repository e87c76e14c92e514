"""The loop's schedule, and which parameters are decayed."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lmdeploy_vico.training.loop.folder import RunFolder
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import Loop, Pace, Schedule, is_decayed


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


def test_a_log_has_lines_of_progress(tmp_path):
    """Where no bar can be drawn, twenty lines say how far a run is."""
    torch.manual_seed(0)
    model, output, processes = nn.Linear(3, 1), io.StringIO(), Processes()
    console = Console(file=output, width=120)
    places = [torch.ones(3)] * 100

    def losses(items):
        return model(torch.stack(items)).square()[:, 0]

    folder = RunFolder(tmp_path / 'run', {}, processes)
    schedule = Schedule(steps=50, batch=2, rate=1e-2, least_rate=1e-3)
    Loop('lesson', model, places, losses, lambda name: True, schedule, Pace(save_every=50), processes).run(
        folder, folder.log(), console
    )
    lines = [line for line in output.getvalue().splitlines() if line.startswith('lesson: step')]
    assert [line.split()[2] for line in lines] == [str(step) for step in range(3, 51, 3)]
    first, last = (float(line.rpartition(' ')[2]) for line in (lines[0], lines[-1]))
    assert lines[0].startswith('lesson: step 3 of 50, loss ') and last < first
