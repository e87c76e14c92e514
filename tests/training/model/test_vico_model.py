"""The model and Eq. 1, against the independent implementation; gradients; weights there and back."""

import numpy as np
import pytest
import torch
from parity.reference import Reference
from training.independent import independent_logits, kl
from training.made import CPU

from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.model import losses
from lmdeploy_vico.training.model.build import PARTS, fill, outline, recompute, set_types
from lmdeploy_vico.training.model.losses import Target, sample_means
from lmdeploy_vico.training.model.vico_model import VicoModel
from lmdeploy_vico.training.model.weights import Tensors, disassemble


def none_of(sample):
    return np.zeros(len(sample.tiles), bool)


def target_of(model, samples):
    with torch.no_grad():
        hidden = model(lay_out(samples, [none_of(sample) for sample in samples]))
    return Target(hidden, model.language_model.lm_head.weight.detach())


def test_eq_1_is_0_without_compression(made):
    samples = [made.samples[i] for i in range(4)]
    model = made.model()
    divergence = model(lay_out(samples, [none_of(sample) for sample in samples]), target_of(model, samples))
    assert len(divergence) > 10 and (divergence == 0).all()


def test_eq_1_is_what_an_independent_computation_says(made):
    """Policy and reference differ by compression and by weights; samples of different length share a batch."""
    samples = [made.samples[i] for i in range(4)]
    compressed = [np.array(kinds, bool) for kinds in ([1], [0, 1, 0], [1, 0, 1, 1], [])]
    model = made.model()
    target = target_of(model, samples)
    independent, base = Reference(made.path), Reference(made.path)
    with torch.no_grad():
        for parameter in (model.mlp1[3].weight, model.language_model.lm_head.weight):
            parameter *= 1.1
        for parameter in (independent.vision.mlp1[3].weight, independent.language.lm_head.weight):
            parameter *= 1.1
        batch = lay_out(samples, compressed)
        ours = sample_means(model(batch, Target(target.hidden, base.language.lm_head.weight)), batch.responses)
    expected = [
        kl(independent_logits(base, sample, none_of(sample)), independent_logits(independent, sample, chosen))
        for sample, chosen in zip(samples, compressed, strict=True)
    ]
    assert min(expected) > 0.01
    assert ours.tolist() == pytest.approx(expected, rel=1e-4)


def test_long_responses_are_taken_in_chunks(dense, monkeypatch):
    samples = [dense.samples[0]]
    model = dense.model('language')
    target = target_of(dense.model(), samples)
    batch = lay_out(samples, [~none_of(samples[0])])
    results = []
    for chunk in (1024, 3):
        monkeypatch.setattr(losses, 'CHUNK', chunk)
        divergence = model(batch, target)
        model.zero_grad()
        divergence.mean().backward()
        results.append((divergence.detach(), model.language_model.lm_head.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('parts', [['mlp2'], ['vit', 'mlp1', 'mlp2', 'language'], ['language']], ids='+'.join)
def test_gradients_reach_every_trained_tensor_and_no_other(made, parts):
    samples = [made.samples[1], made.samples[3]]
    model = made.model(*parts)
    target = target_of(made.model(), samples)
    model(lay_out(samples, [np.array([1, 0, 0], bool), none_of(samples[1])]), target).mean().backward()
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize('index, compressed', [(3, []), (1, [0, 0, 0]), (1, [1, 1, 1])])
def test_every_process_has_a_gradient_for_every_parameter(dense, index, compressed):
    """Shards are reduced over processes, so a sample without images, or without a full tile, has them too."""
    sample = dense.samples[index]
    model = dense.model('vit', 'mlp1', 'mlp2', 'language')
    model(lay_out([sample], [np.array(compressed, bool)]), target_of(dense.model(), [sample])).mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_routers_gradients(dense):
    model = dense.model('router', router_only=True)
    tiles = torch.from_numpy(dense.samples[1].tiles)
    torch.nn.functional.cross_entropy(model(tiles), torch.tensor([0, 1, 0])).backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(PARTS['router'])
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == trained, name


def test_recomputing_changes_no_gradient(made):
    samples = [made.samples[1]]
    target = target_of(made.model(), samples)
    grads = []
    for again in (False, True):
        model = made.model('vit', 'mlp1', 'mlp2', 'language')
        if again:
            recompute(model)
        model(lay_out(samples, [np.array([1, 0, 0], bool)]), target).mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_parameters_are_the_published_tensors(made):
    """Taken apart, the parameters are the checkpoint's tensors, but for those that nothing reads."""
    tensors = Tensors(made.path)
    ours = {n: t for name, value in made.model().named_parameters() for n, t in disassemble(name, value)}
    unread = set(tensors.shapes) - set(ours)
    assert all('attn3' in n or 'attn4' in n or 'norm3' in n or 'norm4' in n for n in unread) and unread
    assert {n: tuple(t.shape) for n, t in ours.items()} | {n: tensors.shapes[n] for n in unread} == checkpoint_shapes(
        made.config
    )
    for name, value in ours.items():
        assert torch.equal(value, tensors.read(name)), name


def test_what_is_trained_is_kept_in_float32(dense):
    model = dense.model('mlp2')
    set_types(model, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if n.startswith('mlp2.')} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith('mlp2.')} == {torch.bfloat16}


def test_a_plain_checkpoint_lacks_what_init_adds(dense, make_checkpoint):
    plain = make_checkpoint(flash=False, dtype='float32')
    with pytest.raises(UnsupportedCheckpointError, match=r'missing tensors: gating\.'):
        fill(outline(dense.config), [plain], CPU)


def test_other_language_models_are_refused(config):
    config['llm_config']['model_type'] = 'qwen2'
    with pytest.raises(TrainingError, match="'qwen2'; qwen3 and qwen3_moe"):
        VicoModel(config)


def test_tied_embeddings_are_refused(config):
    config['llm_config']['tie_word_embeddings'] = True
    with pytest.raises(TrainingError, match='models without a head of their own cannot'):
        VicoModel(config)


def test_the_attention_that_a_config_names_is_not_needed(config):
    config['llm_config']['attn_implementation'] = 'flash_attention_2'
    assert outline(config).language_model.config._attn_implementation == 'sdpa'
