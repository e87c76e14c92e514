"""Servers start, on a busy host too; one that cannot serve its checkpoint does not, and says why."""

import contextlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from waiting import HANG

from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.launch import ApiServer

pytestmark = pytest.mark.server


def refusal(checkpoint, tmp_path, *arguments, **environment):
    """Start a server that must refuse; returns its log."""
    server = ApiServer(checkpoint, *arguments, log=tmp_path / 'log', environment=environment, timeout=HANG)
    server.start()
    try:
        assert server.wait_until_ended() != 0
    finally:
        server.stop()
    return server.log_text()


@pytest.mark.busy(times=15)
def test_two_servers_start_at_a_time(make_checkpoint, tmp_path):
    servers = [ApiServer(make_checkpoint(), log=tmp_path / f'log {number}', timeout=HANG) for number in range(2)]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait_until_ready()
            assert 'Traceback' not in server.log_text()


def test_missing_tensors(make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    for shard in path.glob('*.safetensors'):
        tensors = load_file(shard)
        tensors.pop('language_model.model.layers.1.mlp.up_proj.weight', None)
        tensors.pop('language_model.model.norm.weight', None)
        save_file(tensors, shard)
    log = refusal(path, tmp_path)
    assert 'missing tensors: language_model.model.layers.1.mlp.up_proj.weight, language_model.model.norm.weight.' in log


def test_no_weights_at_all(tmp_path):
    log = refusal(make_checkpoint_without_weights(tmp_path / 'new', '8B'), tmp_path)
    assert 'has neither model.safetensors.index.json nor model.safetensors. To size a deployment without' in log
    assert 'LMDEPLOY_VICO_DUMMY_WEIGHTS=1' in log


def test_dummy_weights_are_not_quantised(tmp_path):
    path = make_checkpoint_without_weights(tmp_path / 'new', '1B')
    log = refusal(path, tmp_path, '--model-format', 'fp8', LMDEPLOY_VICO_DUMMY_WEIGHTS='1')
    assert 'dummy_weights cannot make up quantised weights' in log


def test_other_pixel_shuffle(make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(config | {'ps_version': 'v1'}))
    assert "ps_version is 'v1' in config.json; only 'v2' is supported." in refusal(path, tmp_path)


@pytest.mark.parametrize(
    'arguments, environment, message',
    [
        (('--hf-overrides', '{"vico": {"compresion": "none"}}'), {}, "'compresion' is not an option; the options are"),
        ((), {'LMDEPLOY_VICO_MAX_TILES': 'lots'}, "max_tiles must be an integer of at least 1, not 'lots'"),
        ((), {'LMDEPLOY_VICO_VISION_DEVICE': 'cpu', 'LMDEPLOY_VICO_KERNELS': 'triton'}, "do not run on 'cpu' devices"),
        (
            ('--hf-overrides', '{"vico": {"vit_speedups": "cudnn_attention", "vision_device": "cpu"}}'),
            {},
            'vit_speedups: cudnn_attention needs a CUDA device, and the vision side runs on cpu; leave it out.',
        ),
    ],
)
def test_bad_options(make_checkpoint, tmp_path, arguments, environment, message):
    assert message in refusal(make_checkpoint(), tmp_path, *arguments, **environment)
