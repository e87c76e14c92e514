"""Consistency training: the loss falls, a run goes on as if it had not stopped, and two processes do what one does."""

import json

import numpy as np
import pytest
import torch
from training.made import SAMPLES, Made, write_lines
from training.runs import RATES, SHORT, log_of, made, options, report_of, weights_of

from lmdeploy_vico import cli
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.training import TrainingError, arguments, command
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import Loop
from lmdeploy_vico.training.model.build import PARTS
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.stages.consistency import ConsistencyTraining
from lmdeploy_vico.training.stages.divergence import divergence, targets_of


@pytest.fixture(scope='module')
def long(start, plain, few, tmp_path_factory):
    """12 steps of each phase, judged before and after."""
    path = tmp_path_factory.mktemp('long') / 'run'
    steps = ['--steps', 12, '--batch', 2, '--warm-up-steps', 12, '--held-out', few, *RATES]
    made('consistency', *options(start, plain, few, path, *steps)).run()
    return path


def test_12_steps_lower_the_loss_of_either_phase(long):
    losses = [loss for phase, _, loss in log_of(long, 'loss') if phase == 'warm-up']
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    report = report_of(long)
    warmed = losses[-1]
    assert report['before']['0'] == 0, 'the policy begins as the reference'
    assert report['after']['1'] < 0.7 * warmed < report['before']['1']


def test_the_schedule_is_the_papers(long):
    rises = [rate for phase, _, rate in log_of(long, 'rate') if phase == 'warm-up']
    assert rises[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3]), 'a fifth of the steps'
    rates = [rate for phase, _, rate in log_of(long, 'rate') if phase == 'main']
    assert rates[0] == 3e-4
    assert rates == sorted(rates, reverse=True)
    assert rates[6] == pytest.approx(2e-4, rel=0.01), 'half way down a cosine'


def test_the_second_phase_goes_on_through_the_data(start, plain, data, tmp_path, monkeypatch):
    """The warm-up's places are not seen again: two steps of two samples each see all four."""
    seen = []

    def noted(self, items):
        seen.extend((sample.place, *chosen.tolist()) for sample, chosen in items)
        return self._pair.policy.mlp2[1].weight.sum()[None] * 0

    monkeypatch.setattr(ConsistencyTraining, '_losses', noted)
    words = options(start, plain, data, tmp_path / 'run', *SHORT, '--warm-up-steps', 1, '--steps', 1)
    made('consistency', *words).run()
    assert {place for place, *_ in seen} == {f'{data}, line {i}' for i in range(1, 5)}


def test_the_output_is_the_published_layout(short, start):
    config, weights = json.loads((short / 'config.json').read_text()), weights_of(short)
    assert config == json.loads((start / 'config.json').read_text())
    assert {name: tuple(value.shape) for name, value in weights.items()} == checkpoint_shapes(config)
    index = json.loads((short / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map']) == set(weights) and len(set(index['weight_map'].values())) > 1
    assert (short / 'tokenizer.json').read_bytes() == (start / 'tokenizer.json').read_bytes()


def test_all_but_the_router_is_trained(short, start):
    before, after = weights_of(start), weights_of(short)
    for name, value in after.items():
        router = name.startswith(('pooling_before_gating', 'gating'))
        assert torch.equal(value, before[name]) == router, name


def test_only_what_is_chosen_is_trained(start, plain, few, tmp_path):
    words = options(start, plain, few, tmp_path / 'run', '--train', 'mlp1', *SHORT, '--warm-up-steps', 1, '--steps', 2)
    made('consistency', *words).run()
    before, after = weights_of(start), weights_of(tmp_path / 'run')
    changed = {name.partition('.')[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {'mlp1', 'mlp2'}


@pytest.mark.parametrize('calls', [5, 10], ids=['in the warm-up', 'in the second phase'])
def test_a_run_goes_on_as_if_it_had_not_stopped(start, plain, few, short, tmp_path, monkeypatch, calls):
    """Bit for bit; the interruption comes between two micro-batches of a step, and after a state was kept."""
    words = options(start, plain, few, tmp_path / 'run', *SHORT, '--save-every', 1)
    losses, left = ConsistencyTraining._losses, iter(range(calls))

    def interrupted(self, items):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return losses(self, items)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ConsistencyTraining, '_losses', interrupted)
        made('consistency', *words).run()
    begun = log_of(tmp_path / 'run', 'loss')
    assert len(begun) == calls // 2
    made('consistency', *words).run()
    names = 'loss', 'rate', 'gradient_norm'
    assert log_of(tmp_path / 'run', *names) == log_of(short, *names)
    ours, theirs = weights_of(tmp_path / 'run'), weights_of(short)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_adapters_go_on_as_if_they_had_not_stopped(start, few, tmp_path, monkeypatch):
    """Interrupted between the phases; the first one leaves no gradients of adapters to the second."""
    steps = ['--steps', 2, '--warm-up-steps', 2]
    words = ['--model', start, '--data', few, '--lora-rank', 4, *SHORT, *steps, '--save-every', 1]
    step, norms, left = Loop._step, [], iter(range(2))

    def watched(self, *given):
        adapters = [value for name, value in self._model.named_parameters() if '.lora_' in name]
        norms.append(sum(value.grad.abs().sum().item() for value in adapters if value.grad is not None))
        return step(self, *given)

    def interrupted(self, *given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, '_step', watched)
        made('consistency', *words, '--output', tmp_path / 'whole').run()
    assert len(norms) == 4 and not any(norms)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, '_step', interrupted)
        made('consistency', *words, '--output', tmp_path / 'run').run()
    made('consistency', *words, '--output', tmp_path / 'run').run()
    names = 'loss', 'gradient_norm'
    assert log_of(tmp_path / 'run', *names) == log_of(tmp_path / 'whole', *names)
    ours, theirs = weights_of(tmp_path / 'run'), weights_of(tmp_path / 'whole')
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_gradient_that_is_no_number_harms_nothing(start, plain, few, tmp_path, monkeypatch):
    """The last state that was kept stays, and nothing is written to be served."""
    words = [*options(start, plain, few, tmp_path / 'run', *SHORT), '--save-every', 1]
    clip, left = torch.nn.utils.clip_grad_norm_, iter(range(2))

    def infinite(*given):
        return clip(*given) if next(left, None) is not None else torch.tensor(float('inf'))

    with monkeypatch.context() as patch:
        patch.setattr('torch.nn.utils.clip_grad_norm_', infinite)
        with pytest.raises(TrainingError, match='warm-up, step 3: the norm of the gradient is inf: lower the'):
            made('consistency', *words).run()
    assert [path.name for path in (tmp_path / 'run' / 'state').iterdir()] == ['warm-up-00000002']
    assert not list((tmp_path / 'run').glob('*.safetensors'))


def test_data_that_have_changed_belong_to_another_run(start, plain, data, tmp_path):
    file = write_lines(data.parent / 'changing.jsonl', [SAMPLES[0], SAMPLES[3]])
    made('consistency', *options(start, plain, file, tmp_path / 'run', *SHORT))
    write_lines(file, [SAMPLES[3], SAMPLES[0]])
    with pytest.raises(TrainingError, match=r'begun with other settings \(content of .*changing.jsonl\)'):
        made('consistency', *options(start, plain, file, tmp_path / 'run', *SHORT))


@pytest.mark.parametrize(
    'words, said',
    [
        (['--batch', 0], '--batch 1 or more'), (['--batch', 3, '--micro-batch', 2], '3 samples cannot be divided'),
        (['--rate', 0], 'learning rates more than 0'), (['--least-rate', 1], '--least-rate must be from 0 to --rate'),
        (['--steps', 0, '--warm-up-steps', 0], 'There are no steps'), (['--save-every', 0], '--save-every'),
        (['--log-every', 0], '--log-every'), (['--micro-batch', 0], '--micro-batch'), (['--seed', -1], '--seed'),
        (['--lora-rank', -1], '--lora-rank must be 0 or more'), (['--max-tiles', 0], '--max-tiles'),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_before_anything_is_read(tmp_path, words, said):
    missing = tmp_path / 'missing'
    with pytest.raises(TrainingError, match=said):
        made('consistency', *options(missing, missing, missing, tmp_path / 'run', *SHORT, *words))
    assert not (tmp_path / 'run').exists()


def test_adapters_are_merged(plain, start, few, tmp_path):
    """With LoRA the model without adapters is the reference; what is written is an ordinary checkpoint."""
    words = ['--model', start, '--data', few, '--output', tmp_path / 'run', '--held-out', few, '--lora-rank', 4, *SHORT]
    made('consistency', *words, '--rate', '3e-3').run()
    report = report_of(tmp_path / 'run')
    assert report['before']['0'] == 0
    assert report['after']['1'] < report['before']['1']
    before, after = weights_of(start), weights_of(tmp_path / 'run')
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name.startswith('mlp2')} == {n for n in before if n.startswith('mlp2')}
    others = {name for name in changed if not name.startswith('mlp2')}
    assert 'language_model.model.layers.0.self_attn.q_proj.weight' in others
    assert all(name.endswith('.weight') and 'norm' not in name for name in others)


def test_adapters_are_judged_as_they_are_written(make_checkpoint, few, tmp_path):
    """Merged, and rounded to the checkpoint's bfloat16."""
    source, path = make_checkpoint(), tmp_path / 'run'
    words = ['--model', source, '--data', few, '--output', path, '--held-out', few, '--lora-rank', 4, '--batch', 2]
    made('consistency', *words, '--steps', 1, '--rate', '1e-3', '--warm-up-steps', 0).run()
    written, reference = Made(path, few), Made(source, few)
    processes, pair = Processes(), Pair(written.model(), reference.model(), Processes())
    targets = targets_of(pair, reference.samples, processes)
    expected = divergence(pair.policy, targets, reference.samples, [1.0], 0, processes)
    assert report_of(path)['after']['1'] == pytest.approx(expected['1'], rel=1e-4)


def test_a_folder_of_other_settings_is_refused(start, plain, few, short, tmp_path):
    with pytest.raises(TrainingError, match=r'begun with other settings \(main, seed\)'):
        made('consistency', *options(start, plain, few, short, *SHORT, '--steps', 5, '--seed', 1))
    (tmp_path / 'precious').touch()
    with pytest.raises(TrainingError, match='not of a training run'):
        made('consistency', *options(start, plain, few, tmp_path, *SHORT))


def test_a_loss_that_is_no_number_ends_the_run(start, plain, few, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ConsistencyTraining, '_losses', lambda self, items: torch.full((1,), float('nan')).requires_grad_()
    )
    run = made('consistency', *options(start, plain, few, tmp_path / 'run', *SHORT))
    with pytest.raises(TrainingError, match='warm-up, step 1: the loss is nan: lower the learning rate'):
        run.run()


def test_bad_samples_end_the_command_before_it_begins(start, plain, data, tmp_path, capsys):
    bad = {'image': 'gone.png', 'conversations': SAMPLES[0]['conversations']}
    path = write_lines(data.parent / 'partly.jsonl', [SAMPLES[0], *[bad] * 7])
    words = map(str, options(start, plain, path, tmp_path / 'run'))
    assert cli.main(['train', 'consistency', *words]) == 1
    said = capsys.readouterr().err
    assert f'{path}, line 2: the image' in said and 'line 6' in said and 'line 7' not in said
    assert '... and 2 more' in said
    assert not (tmp_path / 'run').exists()


class OneOfTwo(Processes):
    """One of two processes, which have found the same; it notes when it has waited for the other one."""

    def __init__(self, rank, output):
        super().__init__()
        self.rank, self.size, self._output, self.said = rank, 2, output, None

    def gather(self, values):
        return values * 2

    def wait(self):
        self.said = self._output()

    def close(self):
        pass


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('lines', [True, False], ids=['samples', 'no file'])
def test_bad_data_is_said_by_the_first_process_alone(start, plain, data, tmp_path, capsys, monkeypatch, rank, lines):
    """Before any has ended, for then torchrun ends the others."""
    path = tmp_path / 'bad.jsonl'
    if lines:
        write_lines(path, [{'image': 'gone.png', 'conversations': SAMPLES[0]['conversations']}] * 2)
    process = OneOfTwo(rank, lambda: capsys.readouterr().err)
    monkeypatch.setattr(command, 'Processes', lambda: process)
    with pytest.raises(SystemExit) as ended:
        cli.main(['train', 'consistency', *map(str, options(start, plain, path, tmp_path / 'run')), '--batch', '2'])
    assert ended.value.code == 1
    sentence = 'gone.png does not exist' if lines else 'bad.jsonl does not exist'
    assert process.said.count(sentence) == (rank == 0)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('workers', [0, 1])
def test_pixels_that_are_damaged_end_the_run_with_a_sentence(start, plain, data, tmp_path, workers):
    """They are found where they are decoded; here in a process of the loader, too."""
    whole = (data.parent / 'cup.png').read_bytes()
    (tmp_path / 'cup.png').write_bytes(whole[: len(whole) // 2])
    path = write_lines(tmp_path / 'a.jsonl', [SAMPLES[3], SAMPLES[0]])
    run = made('consistency', *options(start, plain, path, tmp_path / 'run', *SHORT), workers=workers)
    with pytest.raises(TrainingError) as error:
        run.run()
    said = str(error.value)
    assert said.startswith(f'{path}, line 2: the image ') and 'cannot be read: The image is damaged' in said
    assert '\n' not in said


def test_every_part_can_be_chosen():
    """The command line knows their names without loading torch."""
    assert {*arguments.PARTS, 'router'} == set(PARTS)


def test_what_the_command_needs(capsys):
    assert cli.main(['train', 'consistency', '--data', 'a.jsonl']) == 1
    assert 'train consistency needs --model, --output (or --dry-run).' in capsys.readouterr().err
