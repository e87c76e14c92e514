"""Router training: the loss falls, nothing else changes, and a run goes on as if it had not stopped."""

import shutil

import numpy as np
import pytest
import torch
from training.made import gpt, human, write_lines
from training.runs import SHORT_ROUTER, log_of, losses_of, made, options, report_of, weights_of

from lmdeploy_vico import cli
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.loop.steps import Loop
from lmdeploy_vico.training.stages import ratios
from lmdeploy_vico.training.stages.ratios import Losses

ROUTER = ('pooling_before_gating', 'gating')


@pytest.fixture(scope='module')
def tiles(data, pictures):
    """Samples of one tile each: half of them flat, half of them full of text."""
    samples = []
    for i in range(4):
        for kind, picture in (('flat', pictures['coffee']), ('text', pictures['page'])):
            name = f'{kind}{i}.png'
            corner = (20 * i, 10 * i, 20 * i + (8 if kind == 'flat' else 180), 10 * i + (8 if kind == 'flat' else 180))
            picture.crop(corner).resize((448, 448)).convert('RGB').save(data.parent / name)
            samples.append({'image': name, 'conversations': [human('<image>\nWhat?'), gpt('It.')]})
    return write_lines(data.parent / 'tiles.jsonl', samples)


@pytest.fixture
def by_kind(monkeypatch):
    """Text costs what flat tiles do not, so that 12 steps are enough to learn something."""

    def losses(pair, sample, tile, target, processes):
        return Losses(1.0, 1.0 if sample.tiles.std() < 15 else 3.0)

    monkeypatch.setattr(ratios, 'tile_losses', losses)


def test_12_steps_lower_the_loss(policy, plain, tiles, tmp_path, by_kind):
    path = tmp_path / 'run'
    words = options(policy, plain, tiles, path, '--steps', 12, '--batch', 8, '--rate', '2e-3', '--percentile', 50)
    made('router', *words, '--held-out', tiles).run()
    losses = [loss for _, _, loss in log_of(path, 'loss')]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    report = report_of(path)
    assert report['labels']['compress'] == 0.5
    judged = report['held out']
    assert judged['labels'] == {'compress': 4, 'keep': 4}
    assert judged['agreement'] == 1
    assert judged['scores']['compress']['0.05'] > 0.5 > judged['scores']['keep']['0.95']


def test_what_an_earlier_run_keeps_is_not_copied(policy, plain, data, tmp_path):
    before = tmp_path / 'before'
    shutil.copytree(policy, before)
    for name in ('training.json', 'log.jsonl', 'divergence-after.json', 'ratios-0.jsonl', 'LICENSE'):
        (before / name).write_text('theirs')
    made('router', *options(before, plain, data, tmp_path / 'run', *SHORT_ROUTER, '--steps', 1)).run()
    assert (tmp_path / 'run' / 'LICENSE').read_text() == 'theirs'
    others = [path for path in (tmp_path / 'run').iterdir() if path.is_file() and path.name != 'LICENSE']
    assert all(path.read_bytes() != b'theirs' for path in others)
    assert not (tmp_path / 'run' / 'divergence-after.json').exists()


def test_everything_but_the_router_is_left_alone(policy, short_router):
    before, after = weights_of(policy), weights_of(short_router)
    unread = ('attn3', 'attn4', 'norm3', 'norm4')
    for name, value in after.items():
        trained = name.startswith(ROUTER) and not any(part in name for part in unread)
        assert torch.equal(value, before[name]) != trained, name


def test_a_run_goes_on_as_if_it_had_not_stopped(policy, plain, data, short_router, tmp_path, monkeypatch):
    words = options(policy, plain, data, tmp_path / 'run', *SHORT_ROUTER, '--save-every', 1)
    step, left = Loop._step, iter(range(2))

    def interrupted(self, *given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, '_step', interrupted)
        made('router', *words).run()
    monkeypatch.setattr(ratios, 'tile_losses', None)  # nothing is computed twice
    made('router', *words).run()
    assert log_of(tmp_path / 'run', 'loss', 'gradient_norm') == log_of(short_router, 'loss', 'gradient_norm')
    ours, theirs = weights_of(tmp_path / 'run'), weights_of(short_router)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_thresholds_are_written(policy, plain, tiles, tmp_path, by_kind):
    path = tmp_path / 'run'
    words = options(policy, plain, tiles, path, '--steps', 1, '--batch', 8, '--held-out', tiles)
    made('router', *words, '--relative-threshold', 0.25, '--absolute-threshold', 0).run()
    config = VicoConfig.from_pretrained(path)
    assert (config.relative_threshold, config.absolute_threshold) == (0.25, 0.0)
    # Thresholds can be chosen anew without training again.
    made('router', *words, '--compress', 0.0).run()
    assert report_of(path)['held out']['compressed tiles'] == 0
    assert len(log_of(path, 'loss')) == 1
    assert (
        VicoConfig.from_pretrained(path).absolute_threshold == report_of(path)['thresholds']['flash_absolute_threshold']
    )


@pytest.mark.parametrize(
    'words, said',
    [
        (['--percentile', '101'], '--percentile is out of its range'),
        (['--epsilon', '-1'], '--epsilon must be 0 or more'),
        (['--compress', '0.5'], '--compress chooses the absolute threshold by --held-out'),
        (['--relative-threshold', '2'], '--relative-threshold is out of its range'),
    ],
)
def test_options_that_cannot_be(policy, plain, data, tmp_path, words, said):
    with pytest.raises(TrainingError, match=said):
        made('router', *options(policy, plain, data, tmp_path / 'run', *words))


def test_a_router_needs_a_reference(policy, data, tmp_path, capsys):
    words = ['--model', str(policy), '--data', str(data), '--output', str(tmp_path / 'run')]
    assert cli.main(['train', 'router', *words]) == 1
    assert 'train router needs --reference.' in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_not_kept(policy, plain, data, tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, 'sample_means', lambda tokens, responses: torch.full((2,), float('nan')))
    with pytest.raises(TrainingError, match='line 1: the loss of a tile is no number|line [0-9]+: the loss of a tile'):
        made('router', *options(policy, plain, data, tmp_path / 'run', *SHORT_ROUTER)).run()
    assert not (tmp_path / 'run' / 'ratios-0.jsonl').read_text()


def test_a_line_that_was_broken_off_is_computed_again(policy, plain, data, short_router, tmp_path):
    path = tmp_path / 'run'
    words = options(policy, plain, data, path, *SHORT_ROUTER)
    made('router', *words)
    whole = (short_router / 'ratios-0.jsonl').read_text()
    (path / 'ratios-0.jsonl').write_text(whole[:-10])
    made('router', *words).run()
    assert losses_of(path / 'ratios-0.jsonl') == losses_of(short_router / 'ratios-0.jsonl')
