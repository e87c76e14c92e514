"""Two processes do what one does; and computing in bfloat16, as on a GPU, does about the same, in one or in two.

All runs of two processes share a start, which is most of their time.
"""

import json

import pytest
import torch
from training.runs import SHORT, SHORT_ROUTER, TOGETHER, log_of, losses_of, made, options, torchrun, weights_of

TRAINED = {'vision_model', 'mlp1', 'mlp2', 'language_model'}
ROUTER = {'pooling_before_gating', 'gating'}


@pytest.fixture(scope='module')
def together(request, start, policy, plain, few, data, tmp_path_factory):
    """The folder of the runs that share a start of two processes, by name; without those that long tests look at."""
    folder = tmp_path_factory.mktemp('together')

    def line(name, compute, stage, *words):
        output = folder / name
        given = (start, plain, few, output) if stage == 'consistency' else (policy, plain, data, output)
        return [compute, ['train', stage, *map(str, [*options(*given, *words), '--workers', 0])]]

    lines = [
        line('weights', 'bfloat16', 'consistency', *SHORT, '--held-out', few),
        line('adapters', 'bfloat16', 'consistency', *SHORT, '--held-out', few, '--lora-rank', 4),
        line('router', 'float32', 'router', *SHORT_ROUTER),
        line('router in bfloat16', 'bfloat16', 'router', *SHORT_ROUTER),
        line('float32', 'float32', 'consistency', *SHORT),
    ]
    here = [item for item in request.session.items if item.path == request.path]
    if not any(item.get_closest_marker('long') for item in here):
        lines = lines[-1:]
    (folder / 'runs.json').write_text(json.dumps(lines))
    torchrun(TOGETHER, folder / 'runs.json')
    return folder


def test_two_processes_do_what_one_does(together, start, short):
    """Sharded with FSDP over gloo; one process has the sample with an image, the other the one without."""
    path = together / 'float32'
    kept = {file.name for file in (path / 'state').glob('main-*/*.distcp')}
    assert kept == {'__0_0.distcp', '__1_0.distcp'}, 'each has kept its shards'
    names = 'loss', 'gradient_norm'
    for ours, theirs in zip(log_of(path, *names), log_of(short, *names), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-3)
    before, one, two = weights_of(start), weights_of(short), weights_of(path)
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert apart < 0.02 * moved


def require_about_the_same(path, short):
    """Losses and gradients at first; what follows is close as long as the same is trained."""
    names = 'loss', 'gradient_norm'
    ours, theirs = log_of(path, *names), log_of(short, *names)
    assert len(ours) == len(theirs)
    assert ours[0][2] == pytest.approx(theirs[0][2], rel=0.01)
    assert ours[0][3] == pytest.approx(theirs[0][3], rel=0.05)
    assert ours != theirs
    assert [each[2] for each in ours[:3]] == pytest.approx([each[2] for each in theirs[:3]], rel=0.2)


def changed(before, after):
    """The parts of a checkpoint of which something has been trained."""
    before, after = weights_of(before), weights_of(after)
    return {name.partition('.')[0] for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.long
@pytest.mark.parametrize('name', ['weights', 'adapters'])
def test_two_processes_in_bfloat16(together, start, short, name):
    """As on GPUs: shards in float32 and gathered in bfloat16, beside frozen ones in bfloat16; judged before, too."""
    # Rounding grows from step to step, and with adapters the second phase trains something else.
    require_about_the_same(together / name, short)
    assert changed(start, together / name) == TRAINED


@pytest.mark.long
def test_two_processes_train_a_router_as_one_does(together, short_router):
    path = together / 'router'
    both = [losses_of(path / f'ratios-{rank}.jsonl') for rank in range(2)]
    assert all(both), 'each has computed some'
    alone = losses_of(short_router / 'ratios-0.jsonl')
    shared = both[0] | both[1]
    assert shared.keys() == alone.keys()
    for tile, losses in shared.items():
        assert losses == pytest.approx(alone[tile], rel=1e-3, abs=1e-6)
    names = 'loss', 'gradient_norm'
    for one, two in zip(log_of(path, *names), log_of(short_router, *names), strict=True):
        assert one[:2] == two[:2] and one[2:] == pytest.approx(two[2:], rel=1e-3)


def require_about_the_same_router(path, short_router, policy):
    alone = losses_of(short_router / 'ratios-0.jsonl')
    ours = {}
    for file in path.glob('ratios-*.jsonl'):
        ours |= losses_of(file)
    assert ours.keys() == alone.keys()
    for tile, (_, compressed) in ours.items():
        assert compressed == pytest.approx(alone[tile][1], rel=0.1)
    assert log_of(path) == log_of(short_router)
    assert changed(policy, path) == ROUTER


@pytest.mark.long
def test_two_processes_train_a_router_in_bfloat16(together, policy, short_router):
    require_about_the_same_router(together / 'router in bfloat16', short_router, policy)


def test_one_process_in_bfloat16(start, plain, few, short, tmp_path):
    """What is trained is float32 and is cast where it is multiplied; what is frozen is bfloat16."""
    run = made('consistency', *options(start, plain, few, tmp_path / 'run', *SHORT), compute=torch.bfloat16)
    assert {parameter.dtype for parameter in run._pair._reference.parameters()} == {torch.bfloat16}
    run.run()
    require_about_the_same(tmp_path / 'run', short)
    assert changed(start, tmp_path / 'run') == TRAINED


def test_one_process_trains_a_router_in_bfloat16(policy, plain, data, short_router, tmp_path):
    path = tmp_path / 'run'
    made('router', *options(policy, plain, data, path, *SHORT_ROUTER), compute=torch.bfloat16).run()
    require_about_the_same_router(path, short_router, policy)
