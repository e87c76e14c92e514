"""The folder of a run: whole states only, and a log without what is done again."""

import json

import pytest
import torch

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.loop.folder import RunFolder, entries
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import local_share


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / 'run', {'seed': 0}, Processes())


def test_only_the_newest_state_is_kept(folder):
    for step in (1, 2):
        folder.save('main', step, {'model': {'weight': torch.full((3,), float(step))}})
    assert [path.name for path in (folder.path / 'state').iterdir()] == ['main-00000002']
    assert folder.newest('main') == 2 and folder.newest('warm-up') is None
    state = {'model': {'weight': torch.zeros(3)}}
    folder.load('main', 2, state)
    assert state['model']['weight'].tolist() == [2.0] * 3


def test_a_state_that_was_broken_off_does_not_count(folder):
    folder.save('main', 1, {'model': {'weight': torch.ones(3)}})
    (folder.path / 'state' / 'main-00000002.partial').mkdir()
    assert folder.newest('main') == 1
    folder.save('main', 2, {'model': {'weight': torch.ones(3)}})
    assert folder.newest('main') == 2


def test_a_log_forgets_what_is_done_again(folder):
    log = folder.log()
    for phase, steps in (('warm-up', 3), ('main', 4)):
        for step in range(1, steps + 1):
            log.write(phase, step, {'loss': 1.0})
    log.forget_after('main', 2)
    log.close()
    kept = [(entry['phase'], entry['step']) for entry in entries(folder.path)]
    assert kept == [('warm-up', 1), ('warm-up', 2), ('warm-up', 3), ('main', 1), ('main', 2)]
    assert list((folder.path / 'tensorboard').glob('events.out.*'))


def test_the_settings_are_kept(folder):
    assert json.loads((folder.path / 'training.json').read_text()) == {'seed': 0}
    RunFolder(folder.path, {'seed': 0}, Processes())
    with pytest.raises(TrainingError, match=r'other settings \(seed\)'):
        RunFolder(folder.path, {'seed': 1}, Processes())


def test_a_batch_is_shared():
    assert local_share(256, 2, 8) == 32
    with pytest.raises(TrainingError, match='12 samples cannot be divided among 8 processes'):
        local_share(12, 1, 8)


def test_a_line_of_the_log_that_was_broken_off_does_not_count(folder):
    log = folder.log()
    log.write('main', 1, {'loss': 1.0})
    log.write('main', 2, {'loss': 2.0})
    log.close()
    file = folder.path / 'log.jsonl'
    file.write_text(file.read_text()[:-5])
    assert [entry['step'] for entry in entries(folder.path)] == [1]


def test_files_that_have_changed_belong_to_another_run(tmp_path):
    file = tmp_path / 'data.jsonl'
    file.write_text('one')
    for _ in range(2):
        RunFolder(tmp_path / 'run', {}, Processes(), [file, tmp_path / 'missing'])
    file.write_text('two')
    with pytest.raises(TrainingError, match='content of .*data.jsonl'):
        RunFolder(tmp_path / 'run', {}, Processes(), [file])
