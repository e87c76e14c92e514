"""The estimates: counted against the published shapes, and against PyTorch's own count of operations."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmdeploy_vico import cli
from lmdeploy_vico.checkpoints.flops import VIT_TOKENS
from lmdeploy_vico.checkpoints.names import UNUSED
from lmdeploy_vico.checkpoints.random.published import MODELS, config_of, tensor_shapes
from lmdeploy_vico.training.cost import estimate
from lmdeploy_vico.training.cost.estimate import Workload
from lmdeploy_vico.training.cost.shapes import Shapes
from lmdeploy_vico.training.model.adapters import add_adapters
from lmdeploy_vico.training.model.build import choose, outline, set_types, units
from lmdeploy_vico.training.model.weights import published_shapes

TOKENS = 1000
WORK = Workload(tiles=10, text=512, gpus=8, flops=3e14, batch=256, micro_batch=1, steps=100)


@pytest.fixture(scope='module', params=MODELS)
def published(request):
    return request.param, config_of(request.param), Shapes.of(config_of(request.param))


def test_names_and_shapes_are_the_published_ones(published):
    name, config, shapes = published
    model = outline(config)
    assert {parameter.device.type for parameter in model.parameters()} == {'meta'}
    expected = {n: shape for n, shape in tensor_shapes(MODELS[name]).items() if not n.startswith(UNUSED)}
    assert published_shapes(model.named_parameters()) == expected
    assert shapes.total == sum(torch.Size(shape).numel() for shape in expected.values())


def test_units_are_the_blocks_and_layers(published):
    name, config, shapes = published
    size = MODELS[name].size
    assert len(shapes.units) == size.vit_layers + size.layers + 1
    assert sum(shapes.units.values()) == shapes.total
    assert {len(list(unit.parameters())) for _, unit in units(outline(config))} <= {11, 12, 13, 14, 15}
    # The largest unit is small beside the model, and the root is what is used before, between and after.
    assert shapes.largest_unit < shapes.total / 20
    embeddings = 2 * size.hidden * MODELS[name].vocab_size
    assert embeddings < shapes.units['root'] < embeddings + 2.2 * sum(shapes.parameters[p] for p in ('mlp2', 'router'))


def test_memory_falls_with_gpus_and_8b_fits_on_eight(published):
    name, _, shapes = published
    costs = [estimate.consistency(shapes, ['vit', 'mlp1', 'mlp2', 'language'], work(gpus)) for gpus in (1, 8, 64)]
    assert costs[0].states == 8 * costs[1].states == 64 * costs[2].states
    if name == '8B':
        assert costs[1].memory < 0.9 * 80e9
        assert estimate.router(shapes, work(1)).memory < 0.9 * 80e9, 'and its router on one'


def work(gpus):
    return Workload(WORK.tiles, WORK.text, gpus, WORK.flops, WORK.batch, WORK.micro_batch, WORK.steps)


def test_states_are_what_a_model_holds(dense):
    """Weights as they are kept, a gradient and two moments for each that is trained, and the reference."""
    shapes = Shapes.of(dense.config)
    policy, reference = outline(dense.config), outline(dense.config)
    choose(policy, ['mlp2', 'mlp1'])
    for model in (policy, reference):
        set_types(model, torch.bfloat16)
    trained = [p for p in policy.parameters() if p.requires_grad]
    held = sum(p.nbytes for model in (policy, reference) for p in model.parameters()) + 3 * sum(
        p.nbytes for p in trained
    )
    cost = estimate.consistency(shapes, ['mlp1'], work(1))
    assert cost.states == held
    assert cost.trained == sum(p.numel() for p in trained)


def test_adapters_are_what_is_trained_and_there_is_no_reference(dense):
    policy = outline(dense.config)
    add_adapters(policy, 4, 8)
    choose(policy, ['mlp2'])
    set_types(policy, torch.bfloat16)
    trained = [p for p in policy.parameters() if p.requires_grad]
    cost = estimate.consistency(Shapes.of(dense.config, lora_rank=4), ['vit', 'language'], work(1))
    assert cost.states == sum(p.nbytes for p in policy.parameters()) + 3 * sum(p.nbytes for p in trained)
    assert cost.trained == sum(p.numel() for p in trained)


def test_adapters_cost_less():
    parts = ['vit', 'mlp1', 'mlp2', 'language']
    config = config_of('8B')
    whole, adapted = Shapes.of(config), Shapes.of(config, lora_rank=16)
    assert adapted.total == whole.total and adapted.units == whole.units
    weights, adapters = (estimate.consistency(shapes, parts, WORK) for shapes in (whole, adapted))
    assert adapters.gathered < weights.gathered and adapters.activations == weights.activations
    assert 0.6 < adapters.hours / weights.hours < 1, 'all but the products for gradients of weights'
    assert set(adapted.adapters) == set(adapted.units)
    assert all(count for name, count in adapted.adapters.items())


@pytest.mark.parametrize('name', ['1B', '8B', '38B'])
def test_operations_are_those_that_pytorch_counts(name):
    """PyTorch counts attention as if it were not causal, and leaves out norms and biases, counted as products here."""
    config = config_of(name)
    shapes, model = Shapes.of(config), outline(config)
    assert shapes.vit_flops(2) == pytest.approx(
        counted(model.patches, torch.empty(2, 448, 448, 3, dtype=torch.uint8, device='meta')), rel=0.01
    )
    hidden = torch.empty(1, TOKENS, config['llm_config']['hidden_size'], dtype=torch.bfloat16, device='meta')
    causal = {'full_attention': None}  # as without a mask, which transformers would look for values in
    language = counted(lambda: model.language_model.model(inputs_embeds=hidden, attention_mask=causal, use_cache=False))
    llm = config['llm_config']
    acausal = 2 * TOKENS**2 * llm['num_attention_heads'] * llm['head_dim'] * llm['num_hidden_layers']
    assert shapes.language_flops(TOKENS, 0) == pytest.approx(language - acausal, rel=0.01)
    head = counted(lambda: model.language_model.lm_head(hidden))
    assert shapes.language_flops(TOKENS, TOKENS) - shapes.language_flops(TOKENS, 0) == head


def counted(function, *operands):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*operands)
    return counter.get_total_flops()


def test_a_token_meets_some_of_the_experts():
    config = config_of('30B-A3B')
    llm = config['llm_config']
    others = llm['num_experts'] - llm['num_experts_per_tok']
    unmet = llm['num_hidden_layers'] * others * 3 * llm['hidden_size'] * llm['moe_intermediate_size']
    shapes = Shapes.of(config)
    layers = sum(count for name, count in shapes.units.items() if name.startswith('language_model'))
    assert shapes.active == layers - unmet
    assert 2e9 < shapes.active < 4e9, 'the A3B of its name, with its embeddings'


def test_work_is_what_is_asked_for():
    shapes = Shapes.of(config_of('8B'))
    parts = ['vit', 'mlp1', 'mlp2', 'language']
    whole = estimate.consistency(shapes, parts, WORK)
    assert whole.tokens == 256 * (10 * (256 + 160) + 2 * 512)
    assert whole.hours == pytest.approx(100 * whole.seconds / 3600)
    assert estimate.consistency(shapes, ['mlp2'], WORK).seconds < 0.75 * whole.seconds
    assert shapes.vit_flops(1) == pytest.approx(2 * 0.304e9 * VIT_TOKENS, rel=0.2)


def test_the_command_prints_all_sizes(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    for stage in ('consistency', 'router'):
        assert cli.main(['train', stage, '--dry-run']) == 0
        said = capsys.readouterr().out
        assert all(f' {name} ' in said for name in MODELS)
        assert 'Activations: the inputs of all units' in said


def test_a_checkpoint_of_ones_own(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'config.json').write_text(json.dumps(dense.config))
    assert cli.main(['train', 'consistency', '--dry-run', '--model', str(tmp_path / 'mine'), '--gpus', '1']) == 0
    assert ' mine ' in capsys.readouterr().out


def test_the_command_takes_a_rank(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    said = []
    for rank in ('0', '8'):
        assert cli.main(['train', 'consistency', '--dry-run', '--like', '1B', '--lora-rank', rank]) == 0
        said.append(next(line for line in capsys.readouterr().out.splitlines() if ' 1B ' in line))
    assert len(set(said)) == 2
    assert cli.main(['train', 'consistency', '--dry-run', '--like', '1B', '--lora-rank', '-1']) == 1
    assert '--lora-rank must be 0 or more.' in capsys.readouterr().err


def test_a_size_that_is_not_known(capsys):
    assert cli.main(['train', 'router', '--dry-run', '--like', '9B']) == 1
    assert '--like takes 1B, 2B, 4B, 8B, 14B, 30B-A3B, 38B, 241B, not 9B.' in capsys.readouterr().err
