"""Replicas of the vision side: weights are read once, and a device without room is named at the start."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lmdeploy_vico.adapter.server.placement.replicas import CopiedWeights, Replicas
from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.stage.errors import DeviceStartError
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tile_encoder import TileEncoder

CUDA = [torch.device('cuda', index) for index in range(4)]
TWO_PROCESSORS = [torch.device('cpu'), torch.device('cpu', 0)]


class CountingCheckpoint(Checkpoint):
    reads = 0

    def load_into(self, module):
        self.reads += 1
        super().load_into(module)


def test_the_checkpoint_is_read_once_and_copied_bit_for_bit(make_checkpoint, pictures):
    path = make_checkpoint()
    checkpoint = CountingCheckpoint(path)
    replicas = Replicas(checkpoint, VicoConfig.from_pretrained(path), TWO_PROCESSORS, Options(), graph=True)
    assert checkpoint.reads == 1
    first, second = (dict(encoder.tower.named_parameters()) for encoder in replicas.encoders)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) and weight.data_ptr() != second[name].data_ptr(), name
    [one], [other] = (VisionEncoder(encoder).encode([pictures['coffee']]) for encoder in replicas.encoders)
    assert torch.equal(one.embeddings, other.embeddings) and one.scores == other.scores


@pytest.mark.parametrize('vit', ['layer_norm', 'rms_norm'])
def test_a_copy_in_bfloat16_has_the_same_bits(make_checkpoint, vit):
    path = make_checkpoint(vit=vit, dtype='float32')

    def tower(weights):
        tower = VisionTower(VicoConfig.from_pretrained(path)).to(torch.bfloat16)
        weights.load_into(tower)
        tower.freeze()
        return tower

    read = tower(Checkpoint(path))
    copied = dict(tower(CopiedWeights(read)).named_parameters())
    assert {weight.dtype for weight in copied.values()} == {torch.bfloat16, torch.float32}
    for name, weight in read.named_parameters():
        assert weight.dtype == copied[name].dtype and torch.equal(weight, copied[name]), name


def test_weights_of_another_shape_are_not_copied():
    with pytest.raises(ValueError, match=r'weight is \[1, 4\] in the source, not \[2, 4\]'):
        CopiedWeights(torch.nn.Linear(4, 1)).load_into(torch.nn.Linear(4, 2))


@pytest.fixture
def config():
    """Of a vision side whose weights take 0.3 GiB in bfloat16."""
    vision = SimpleNamespace(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=4096)
    vision.norm_type, vision.qk_normalization, vision.qkv_bias, vision.layer_norm_eps = 'layer_norm', False, True, 1e-6
    return SimpleNamespace(vision=vision, llm_hidden_size=1024)


@pytest.fixture
def load(monkeypatch, config):
    """``load(errors)``: replicas on four devices that cannot be loaded on those that ``errors`` has one for."""

    def load(errors, **options):
        def load_encoder(weights, config, device, *arguments):
            if device in errors:
                errors[device]()
            return SimpleNamespace(tower=torch.nn.Module(), device=device)

        monkeypatch.setattr(TileEncoder, 'load', load_encoder)
        return Replicas(None, config, CUDA, Options(**options), graph=True)

    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: ((9 - device.index) * GIB, 80 * GIB))
    return load


def out_of_memory():
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')


def out_of_memory_in_a_capture():
    try:
        out_of_memory()
    finally:
        raise RuntimeError('CUDA error: operation failed due to a previous error during capture')


def cublas_without_memory():
    raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')


def triton_without_memory():
    raise RuntimeError('Triton Error [CUDA]: out of memory')


def something_else():
    raise RuntimeError('CUDA error: an illegal memory access was encountered')


@pytest.mark.parametrize(
    'error', [out_of_memory, out_of_memory_in_a_capture, cublas_without_memory, triton_without_memory]
)
def test_a_device_without_room_is_named(load, error):
    with pytest.raises(OptionError) as refusal:
        load({CUDA[2]: error}, tile_batch=4)
    assert str(refusal.value) == (
        'The vision side does not fit on cuda:2: its weights take 0.3 GiB, besides working memory, and 7.0 of its '
        "80.0 GiB were free: set vision_device to devices with more free memory (it is 'auto' now, which is "
        'cuda:0, cuda:1, cuda:2, cuda:3), or make tile_batch smaller.'
    )


def test_other_errors_are_left_alone(load):
    with pytest.raises(RuntimeError, match='an illegal memory access'):
        load({CUDA[1]: something_else})


def test_a_device_that_has_no_room_for_a_context(load, monkeypatch):
    def full(device):
        if device.index == 3:
            out_of_memory()
        return 9 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, 'mem_get_info', full)
    with pytest.raises(OptionError, match='does not fit on cuda:3: .* and no memory at all was free: set vision_dev'):
        load({})


def test_a_device_that_runs_out_of_memory_in_its_thread(load):
    replicas = load({})
    with pytest.raises(OptionError, match='does not fit on cuda:1: .* and 8.0 of its 80.0 GiB were free: set'):  # noqa: SIM117
        with replicas.fitting():
            raise DeviceStartError(CUDA[1], torch.OutOfMemoryError('CUDA out of memory.'))
    with pytest.raises(DeviceStartError, match='cannot start on cuda:1: trouble'), replicas.fitting():
        raise DeviceStartError(CUDA[1], RuntimeError('trouble'))


def test_the_real_encoder_takes_what_the_replicas_give_it(make_checkpoint):
    path = make_checkpoint()
    config = replace(VicoConfig.from_pretrained(path), max_tiles=3)
    [encoder] = Replicas(Checkpoint(path), config, [torch.device('cpu')], Options(tile_batch=2), graph=False).encoders
    assert (encoder.tile_batch, encoder.config, encoder.dtype) == (2, config, torch.float32)
