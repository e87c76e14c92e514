"""The ViT's switches: which can be set where, that each runs what it says, and that without them nothing changes."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.choices import NO_SPEEDUPS, SPEEDUPS, Speedups, parse_speedups
from lmdeploy_vico.config import IMAGE_MEAN, IMAGE_STD, InternViTConfig, VicoConfig
from lmdeploy_vico.kernels import implementation
from lmdeploy_vico.vision.model import intern_vit, speedups
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel
from lmdeploy_vico.vision.model.speedups import UnsupportedSpeedupError, cudnn_attention, require_speedups
from lmdeploy_vico.vision.tile_encoder import TileEncoder

CUDA = torch.device('cuda:0')
BIG = InternViTConfig(3200, 45, 25, 12800, 'rms_norm', True, False, 1e-6)
SMALL = InternViTConfig(1024, 24, 16, 4096, 'layer_norm', False, True, 1e-6)


def load(path, **switches):
    return TileEncoder.load(Checkpoint(path), VicoConfig.from_pretrained(path), speedups=Speedups(**switches))


def forbid(monkeypatch, owner, *names):
    def forbidden(*args, **kwargs):
        raise AssertionError('not what was chosen')

    for name in names:
        monkeypatch.setattr(owner, name, forbidden)


@pytest.fixture
def tiles(rng):
    return rng.integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)


@pytest.fixture(params=['layer_norm', 'rms_norm'])
def path(request, make_checkpoint):
    return make_checkpoint(vit=request.param)


class TestWhatCannotRun:
    @pytest.fixture
    def hopper(self, monkeypatch):
        """A device that has everything, as far as torch can be asked without one."""
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        monkeypatch.setattr(torch.backends.cudnn, 'is_available', lambda: True)
        monkeypatch.setattr(torch.backends.cuda, 'can_use_cudnn_attention', lambda params: True)
        zeros = torch.zeros
        monkeypatch.setattr(torch, 'zeros', lambda *size, device, **rest: zeros(*size, **rest))
        monkeypatch.setattr(speedups, 'cudnn_attention', lambda query, key, value: query)
        monkeypatch.setattr(speedups, 'implementation', lambda device: implementation.TRITON)

    def refused(self, message, config=BIG, device=CUDA, dtype=torch.bfloat16, **switches):
        with pytest.raises(UnsupportedSpeedupError, match=f'^vit_speedups: {message}') as raised:
            require_speedups(Speedups(**switches), config, device, dtype)
        assert str(raised.value).endswith('; leave it out.')

    def test_all_of_them_on_hopper(self, hopper):
        require_speedups(parse_speedups(','.join(SPEEDUPS)), BIG, CUDA, torch.bfloat16)

    def test_nothing_is_asked_of_the_device_without_them(self, monkeypatch):
        forbid(monkeypatch, torch.cuda, 'get_device_capability')
        require_speedups(NO_SPEEDUPS, SMALL, CUDA, torch.bfloat16)

    def test_cudnn_attention_on_a_cpu(self):
        self.refused('cudnn_attention needs a CUDA device', device=torch.device('cpu'), cudnn_attention=True)

    @pytest.mark.parametrize('capability', [(8, 0), (8, 9), (10, 0)])
    def test_cudnn_attention_elsewhere_than_on_hopper(self, hopper, monkeypatch, capability):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        given = '.'.join(map(str, capability))
        self.refused(f'cudnn_attention is for Hopper .* 9.0.*, and cuda:0 has {given}', cudnn_attention=True)

    def test_cudnn_attention_in_float32(self, hopper):
        self.refused('cudnn_attention needs float16 or .* in float32', dtype=torch.float32, cudnn_attention=True)

    def test_cudnn_attention_without_cudnn(self, hopper, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, 'is_available', lambda: False)
        self.refused('cudnn_attention needs cuDNN attention, which this build', cudnn_attention=True)

    def test_cudnn_attention_that_torch_holds_for_faulty(self, hopper, monkeypatch):
        seen = []
        monkeypatch.setattr(
            torch.backends.cuda, 'can_use_cudnn_attention', lambda params: seen.append(params.query.shape)
        )
        self.refused('cudnn_attention is refused by torch for heads of 128 with cuDNN', cudnn_attention=True)
        assert seen == [(1, 25, 1025, 128)]

    def test_cudnn_attention_that_fails(self, hopper, monkeypatch):
        def fails(query, key, value):
            assert query.shape == key.shape == value.shape == (1, 16, 1025, 64)
            assert query.stride() == (1025 * 3072, 64, 3072, 1), 'as the fused projection leaves it'
            raise RuntimeError('No valid execution plans built.\nmore')

        monkeypatch.setattr(speedups, 'cudnn_attention', fails)
        message = r'cudnn_attention fails with cuDNN .* \(No valid execution plans built.\); leave'
        self.refused(message, config=SMALL, cudnn_attention=True)

    @pytest.mark.parametrize('name', ['residual_norm', 'strided_qk_norm'])
    def test_kernels_where_torch_was_chosen(self, hopper, monkeypatch, name):
        monkeypatch.setattr(speedups, 'implementation', lambda device: implementation.TORCH)
        self.refused(f'{name} needs the Triton kernels', **{name: True})

    def test_q_and_k_that_are_not_normalised(self, hopper):
        self.refused('strided_qk_norm needs a ViT that normalises q and k', config=SMALL, strided_qk_norm=True)

    def test_the_start_ends_before_anything_is_loaded(self, make_checkpoint, monkeypatch):
        forbid(monkeypatch, Checkpoint, 'require', 'load_into')
        with pytest.raises(UnsupportedSpeedupError, match='cudnn_attention needs a CUDA device, and .* on cpu'):
            load(make_checkpoint(), cudnn_attention=True)


def test_cudnn_attention_is_called_as_torch_declares_it():
    """On tensors without storage: arguments, the shape of what comes back, and that the heads lie together in it."""
    fused = torch.empty(2, 1025, 3 * 1024, dtype=torch.bfloat16, device='meta')
    heads = [part.view(2, 1025, 16, 64).transpose(1, 2) for part in fused.chunk(3, -1)]
    attended = cudnn_attention(*heads)
    assert attended.shape == (2, 16, 1025, 64)
    assert attended.transpose(1, 2).is_contiguous()


def test_cudnn_attention_leaves_the_state_of_the_process_alone(monkeypatch):
    forbid(monkeypatch, torch.nn.attention, 'sdpa_kernel')
    before = torch._C._get_sdp_priority_order()
    empty = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16, device='meta')
    cudnn_attention(empty, empty, empty)
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize('switch', [True, False])
def test_one_attention_runs_and_not_the_other(path, tiles, monkeypatch, switch):
    encoder = load(path)
    expected = encoder.features(tiles)
    attention, calls = F.scaled_dot_product_attention, []

    def attend(query, key, value):
        calls.append(query.shape)
        return attention(query, key, value)

    encoder.tower.vision_model.speedups = Speedups(cudnn_attention=switch)
    monkeypatch.setattr(intern_vit, 'cudnn_attention', attend)
    forbid(monkeypatch, F if switch else intern_vit, 'scaled_dot_product_attention' if switch else 'cudnn_attention')
    features = encoder.features(tiles)
    config = encoder.config.vision
    shape = (1, config.num_attention_heads, 1025, config.head_size)
    assert calls == ([shape] * config.num_hidden_layers * len(tiles) if switch else [])
    assert torch.equal(features.scores, expected.scores)
    assert all(map(torch.equal, features.patches, expected.patches))


def test_padded_patches(path, tiles, monkeypatch):
    expected = load(path).features(tiles)
    encoder = load(path, padded_patches=True)
    linear, widths = F.linear, []

    def recorded(rows, weight, bias=None):
        widths.append(weight.shape[-1])
        return linear(rows, weight, bias)

    monkeypatch.setattr(F, 'linear', recorded)
    features = encoder.features(tiles)
    assert widths.count(592) == len(tiles)
    assert 588 not in widths
    for ours, theirs in zip(features.patches, expected.patches, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert torch.allclose(features.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_padded_rows_hold_the_same_values_and_zeros(rng, dtype):
    pixels = torch.from_numpy(rng.standard_normal((2, 448, 448, 3))).float()
    patches = pixels.reshape(2, 32, 14, 32, 14, 3).permute(0, 1, 3, 5, 2, 4)
    rows = intern_vit._padded_rows(patches, dtype)
    assert rows.shape == (2, 1024, 592)
    assert rows.is_contiguous()
    assert torch.equal(rows[..., :588], patches.reshape(2, 1024, 588).to(dtype))
    assert not rows[..., 588:].any()


def plain_forward(model, tiles):
    """The ViT as it was before there were switches, operation by operation."""
    parts = dict(model.named_modules())
    embeddings, config = model.embeddings, parts['encoder.layers.0.attn']
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    pixels = (tiles.float() / 255 - mean) / std
    patches = pixels.reshape(-1, 32, 14, 32, 14, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, 1024, 588)
    patch = embeddings.patch_embedding
    tokens = F.linear(patches.to(patch.weight.dtype), patch.weight.flatten(1), patch.bias)
    hidden = torch.cat([embeddings.class_embedding.expand(len(tokens), -1, -1), tokens], dim=1)
    hidden = hidden + embeddings.position_embedding
    for layer in model.encoder.layers:
        query, key, value = layer.attn.qkv(layer.norm1(hidden)).chunk(3, dim=-1)
        if config.qk_normalization:
            query, key = layer.attn.q_norm(query), layer.attn.k_norm(key)
        heads = [part.view(*part.shape[:2], config.heads, -1).transpose(1, 2) for part in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(hidden.shape)
        hidden = hidden + layer.attn.proj(attended) * layer.ls1
        hidden = hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(hidden)))) * layer.ls2
    return hidden


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_without_them_the_bits_are_those_of_before(path, tiles, monkeypatch, dtype):
    forbid(monkeypatch, intern_vit, 'residual_norm', 'norm', 'cudnn_attention', '_padded_rows')
    model = load(path).tower.to(dtype).vision_model
    model.freeze()
    batch = torch.from_numpy(tiles)
    with torch.inference_mode():
        assert torch.equal(model(batch), plain_forward(model, batch))


class TestGradients:
    @pytest.fixture
    def model(self, path):
        model = InternVisionModel(VicoConfig.from_pretrained(path).vision)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        return model

    def test_the_default_path_has_them(self, model, tiles):
        model(torch.from_numpy(tiles[:1])).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())

    @pytest.mark.parametrize('name', SPEEDUPS)
    def test_no_speedup_has(self, model, tiles, name):
        model.speedups = Speedups(**{name: True})
        with pytest.raises(RuntimeError, match=re.escape(f'no gradients with vit_speedups ({name})')):
            model(torch.from_numpy(tiles[:1]))
        model.requires_grad_(False)
        with pytest.raises(RuntimeError, match='no gradients with vit_speedups'):
            model.blocks(torch.zeros(1, 2, model.embeddings.class_embedding.shape[-1], requires_grad=True))
