"""The estimate of what the vision side's place costs the KV cache, and that it never stops a start."""

import logging
from contextlib import nullcontext
from math import prod
from types import SimpleNamespace

import pytest
import torch
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy.pytorch.engine.executor.base import ExecutorBase, _WorkerCachePlanSizes
from safetensors.torch import load_file

from lmdeploy_vico.adapter.hf_config import VicoChatConfig, load_vico_config
from lmdeploy_vico.adapter.server.placement import kv_memory
from lmdeploy_vico.adapter.server.placement.devices import parallelism
from lmdeploy_vico.adapter.server.placement.kv_memory import cache_sizing, stored_sizes
from lmdeploy_vico.adapter.server.placement.replicas import FreeMemory
from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.checkpoints.random import configuration
from lmdeploy_vico.checkpoints.random.published import MODELS, tensor_shapes
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS
from lmdeploy_vico.checkpoints.rank_memory import CUDA_CONTEXT, RANK_OVERHEAD, CacheSizing, rank_bytes
from lmdeploy_vico.host_memory import GIB

H100, H200 = 79.1, 139.8  # GiB, as PyTorch gives their memory
WORKING = 0.7  # GiB besides weights and context that a ViT-6B takes in batches of two tiles; an estimate


def published(name):
    model = MODELS[name]
    language = configuration.llm_config(model.size, model.llm, model.vocab_size, dict.fromkeys(SPECIAL_TOKENS, 0))
    vision = configuration.vision_config(model.size, model.vit)
    return VicoChatConfig(**configuration.model_config(vision, language, flash=True))


def vision_bytes(name):
    shapes = tensor_shapes(MODELS[name])
    return 2 * sum(prod(shape) for name, shape in shapes.items() if not name.startswith('language_model.'))


def devices(number):
    return [torch.device('cuda', index) for index in range(number)]


def engine(**arguments):
    return PytorchEngineConfig(**{'enable_mp_engine': True, 'max_batch_size': 1024} | arguments)


@pytest.fixture
def report(monkeypatch, caplog):
    """``report(config, engine, total, vision)``: what is logged, with ``vision`` GiB on each device named there."""
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)

    def report(config, engine, total, vision, path=''):
        before = int(total * GIB) - CUDA_CONTEXT
        after = {device: before - int(taken * GIB) for device, taken in vision.items()}
        # Asking for any other device would make a context on it: a KeyError, and no estimate.
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (after[device], int(total * GIB)))
        monkeypatch.setattr(
            *(torch.cuda, 'get_device_properties'), lambda device: SimpleNamespace(total_memory=int(total * GIB))
        )
        known = {device: FreeMemory(before, int(total * GIB)) for device in vision}
        with caplog.at_level(logging.INFO, 'lmdeploy_vico'):
            kv_memory.report_kv_cache(path, config, engine, known)
        return caplog.text

    return report


@pytest.mark.parametrize('replicas', [1, 8])
@pytest.mark.parametrize('total, here, elsewhere', [(H100, 3.8, 14.5), (H200, 52, 62)])
def test_the_241b_on_eight_devices(monkeypatch, total, here, elsewhere, replicas):
    """About 3.8 instead of 14.5 GiB a rank on 80 GB cards, 52 instead of 62 on H200, with one replica as with eight.

    From published shapes: the language model takes 56.9 GiB of a rank at TP 8 (its split tensors' eighth, all of
    embeddings, head, norms and routers, half of keys and values), the engine's context and NCCL about 1, LMDeploy
    reserves 2.9 for the logits of 8192 + 2 * 1024 tokens, and 0.8 of the rest is KV cache. The vision side takes its
    weights, a CUDA context and :data:`WORKING`. The vocabulary, batch size and budget are LMDeploy's defaults.
    """
    sizing = cache_sizing('', published('241B'), engine(tp=8))
    assert sizing.weights / GIB == pytest.approx(56.94, abs=0.01)
    before = int(total * GIB) - CUDA_CONTEXT
    after = before - vision_bytes('241B') - int(WORKING * GIB)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (after, int(total * GIB)))
    monkeypatch.setattr(
        *(torch.cuda, 'get_device_properties'), lambda device: SimpleNamespace(total_memory=int(total * GIB))
    )
    known = {device: FreeMemory(before, int(total * GIB)) for device in devices(replicas)}
    place = kv_memory.placement(devices(8), known)
    assert sizing.kv_bytes(place.here) / GIB == pytest.approx(here, abs=1.3, rel=0)
    assert sizing.kv_bytes(place.elsewhere) / GIB == pytest.approx(elsewhere, abs=1.3, rel=0)
    if total == H100:
        assert sizing.kv_bytes(place.here) / GIB == pytest.approx(here, abs=0.3)
        assert sizing.kv_bytes(place.elsewhere) / GIB == pytest.approx(elsewhere, abs=0.3)


# The second is room for 8 blocks, for which LMDeploy halves the prefill budget; the first for none.
@pytest.mark.parametrize('free', [60, 60.957, 63.5, 70, 139.8])
def test_the_formula_is_lmdeploys(free):
    sizing = CacheSizing(
        weights=57 * GIB, vocab_size=151936, max_batches=1024, max_prefill_tokens=8192, share=0.8, block=6 * 2**20
    )
    executor = ExecutorBase.__new__(ExecutorBase)
    executor.model_config = SimpleNamespace(vocab_size=sizing.vocab_size, mla_index_topk=None)
    executor.cache_config = SimpleNamespace(
        cache_max_entry_count=sizing.share, max_prefill_token_num=8192, max_batches=1024, num_gpu_blocks=0
    )
    after_loading = int(free * GIB) - sizing.weights - RANK_OVERHEAD
    sizes = [_WorkerCachePlanSizes(sizing.block)]
    with nullcontext() if free > 60 else pytest.raises(RuntimeError, match='No enough gpu memory'):
        left = executor._reserve_runtime_mem([after_loading], sizes, None)
        executor._update_num_gpu_blocks(left, sizes, None)
    assert (executor.cache_config.max_prefill_token_num < 8192) == (free == 60.957)
    assert (executor.cache_config.num_gpu_blocks > 0) == (free > 60)
    assert sizing.kv_bytes(int(free * GIB)) == executor.cache_config.num_gpu_blocks * sizing.block


def test_too_little_for_any_cache():
    sizing = cache_sizing('', published('241B'), engine(tp=8))
    assert sizing.kv_bytes(sizing.weights + GIB) == 0


@pytest.mark.parametrize('name', MODELS)
def test_a_single_rank_has_the_whole_language_model(name):
    shapes = tensor_shapes(MODELS[name])
    whole = 2 * sum(prod(shape) for tensor, shape in shapes.items() if tensor.startswith('language_model.'))
    assert cache_sizing('', published(name), engine()).weights == whole


def test_what_is_split_among_which_ranks():
    config = published('30B-A3B').llm_config
    sizes = {name: 2 * prod(shape) for name, shape in language_model_shapes(config, config).items()}

    def share(arguments, part):
        some = {name: size for name, size in sizes.items() if part in name}
        return sum(some.values()) / rank_bytes(some, parallelism(engine(**arguments)), config.num_key_value_heads)

    tp, ep, both = {'tp': 8}, {'ep': 8, 'tp': 8}, {'ep': 8, 'dp': 4}
    for part, shares in {
        '.experts.': (8, 8, 8),
        'q_proj': (8, 8, 2),
        'k_proj': (4, 4, 2),
        'o_proj': (8, 8, 2),
        'q_norm': (1, 1, 1),
        'mlp.gate.': (1, 1, 1),
        'lm_head': (1, 1, 1),
        'embed_tokens': (1, 1, 1),
    }.items():
        assert tuple(share(arguments, part) for arguments in (tp, ep, both)) == shares, part


def test_of_other_checkpoints_the_stored_bytes_count(make_checkpoint):
    path = make_checkpoint()
    stored = {name: tensor.nbytes for shard in path.glob('*.safetensors') for name, tensor in load_file(shard).items()}
    assert stored_sizes(path) == {name: size for name, size in stored.items() if name.startswith('language_model.')}
    config = load_vico_config(path)
    from_shapes = cache_sizing(path, config, engine()).weights
    config.llm_config.quantization_config = {'quant_method': 'awq'}
    assert cache_sizing(path, config, engine()).weights == sum(stored_sizes(path).values()) == from_shapes


def test_a_warning_where_the_place_costs_a_quarter(report):
    log = report(published('241B'), engine(tp=8), H100, dict.fromkeys(devices(8), 12.9))
    assert 'KV cache: about 3.9 GiB a rank, 14.6 GiB if the vision side were on other devices (estimates)' in log
    assert 'costs about 73 % of the KV cache, and on every rank' in log
    for option in ('vision_device', '--tp', '--cache-max-entry-count, 0.8 now'):
        assert option in log


def test_no_warning_where_it_costs_little(report):
    log = report(published('8B'), engine(), H100, {devices(1)[0]: 1.2})
    assert 'KV cache: about' in log and 'WARNING' not in log


def test_a_vision_side_elsewhere_costs_nothing(report):
    log = report(published('241B'), engine(tp=4), H200, {devices(8)[7]: 12.9})
    assert '; the vision side is on other devices' in log and 'WARNING' not in log


def test_a_language_model_that_does_not_fit(report):
    log = report(published('241B'), engine(tp=4), H100, dict.fromkeys(devices(4), 12.9))
    assert 'leaves no memory for a KV cache: serve it on more devices (--tp)' in log


def test_blocks_that_were_asked_for_are_no_estimate(report):
    log = report(published('8B'), engine(num_gpu_blocks=4096), H100, {devices(1)[0]: 1.2})
    assert 'KV cache: 4096 blocks a rank, as --num-gpu-blocks says' in log


def test_on_a_processor_nothing_is_said(report, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert report(published('8B'), engine(), H100, {}) == ''


@pytest.mark.parametrize(
    'change, arguments, words',
    [
        (lambda config: None, {'model_format': 'fp8'}, 'what the weights take as fp8 is not known'),
        (lambda config: config.llm_config.update({'architectures': ['Other']}), {}, 'the size of the weights is not'),
        (lambda config: config.llm_config.update({'num_key_value_heads': None}), {}, 'TypeError'),
        (lambda config: None, {'tp': 16}, 'the engine needs 16 devices, of which this machine has 8'),
    ],
)
def test_what_is_not_known_is_said_and_stops_nothing(report, tmp_path, change, arguments, words):
    config = published('8B')
    change(config)
    log = report(config, engine(**arguments), H100, {devices(1)[0]: 1.2}, path=tmp_path)
    assert 'KV cache: no estimate' in log and words in log
