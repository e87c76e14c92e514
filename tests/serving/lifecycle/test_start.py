"""Servers start, on a busy host too; one that cannot serve its checkpoint does not, and says why."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from safetensors.torch import load_file, save_file
from waiting import HANG

from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.launch import ApiServer

pytestmark = pytest.mark.server

LOGGED = re.compile(r'\d{4}-\d\d-\d\d [\d:,]+ - lmdeploy(-vico)? - (INFO|WARNING) - ')  # a line of a log


# Importing what a server needs is most of what a refusal takes. This imports it once; each line that it reads is run as
# the lmdeploy command by a copy of it, and it writes that copy's exit status.
COPIES = """
import json, os, sys
statuses = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
import lmdeploy.hf_configs, lmdeploy.serve.openai.api_server, lmdeploy.vl.engine
from lmdeploy.cli import run
for line in sys.stdin:
    sys.argv, environment, log = json.loads(line)
    copy = os.fork()
    if not copy:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.exit(run())
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), file=statuses, flush=True)
"""


@pytest.fixture(scope='module')
def copies():
    program = [sys.executable, '-c', COPIES]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def refusal(copies, tmp_path):
    """``refusal(checkpoint, *arguments, **environment)``: what a server says that must refuse: a sentence."""

    def start(checkpoint, *arguments, **environment):
        server = ApiServer(checkpoint, *arguments, log=tmp_path / 'log')
        server.stop()  # its port is free again
        copies.stdin.write(json.dumps([server.command, environment, str(server.log)]) + '\n')
        copies.stdin.flush()
        hang = threading.Timer(HANG, copies.kill)
        hang.start()
        status = copies.stdout.readline()
        hang.cancel()
        assert int(status) == 1
        [said] = [line for line in server.log_text().splitlines() if not LOGGED.match(line)]
        return said

    return start


@pytest.mark.long
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
    server = ApiServer(path, log=tmp_path / 'log', timeout=HANG)
    server.start()
    try:
        assert server.wait_until_ended() != 0
    finally:
        server.stop()
    log = server.log_text()
    assert 'missing tensors: language_model.model.layers.1.mlp.up_proj.weight, language_model.model.norm.weight.' in log


def test_no_weights_at_all(refusal, tmp_path):
    log = refusal(make_checkpoint_without_weights(tmp_path / 'new', '8B'))
    assert 'has neither model.safetensors.index.json nor model.safetensors. To size a deployment without' in log
    assert 'LMDEPLOY_VICO_DUMMY_WEIGHTS=1' in log


def test_dummy_weights_are_not_quantised(refusal, tmp_path):
    path = make_checkpoint_without_weights(tmp_path / 'new', '1B')
    log = refusal(path, '--model-format', 'fp8', LMDEPLOY_VICO_DUMMY_WEIGHTS='1')
    assert 'dummy_weights cannot make up quantised weights' in log


def test_other_pixel_shuffle(refusal, make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(config | {'ps_version': 'v1'}))
    assert "ps_version is 'v1' in config.json; only 'v2' is supported." in refusal(path)


@pytest.mark.parametrize(
    'arguments, environment, said',
    [
        (('--hf-overrides', '{"vico": {"compresion": "none"}}'), {}, '--hf-overrides "vico" \'compresion\' is not an '),
        ((), {'LMDEPLOY_VICO_COMPRESION': 'none'}, 'LMDEPLOY_VICO_COMPRESION is not an option; the options are '),
        (
            ('--tp', '2'),
            {'LMDEPLOY_VICO_MAX_TILES': 'lots'},
            "max_tiles must be an integer of at least 1, not 'lots', as the environment variable "
            'LMDEPLOY_VICO_MAX_TILES says.',
        ),
        (
            ('--dp', '2', '--tp', '2', '--hf-overrides', '{"vico": {"max_tiles": 0}}'),
            {},
            'max_tiles must be an integer of at least 1, not 0, as --hf-overrides "vico" says.',
        ),
        (
            ('--tp', '2'),
            {'LMDEPLOY_VICO_VISION_DEVICE': 'cuda:7'},
            'vision_device \'cuda:7\' is not a device of this machine: "auto", "cpu" or "cuda:<index>". vision_device '
            'is set by the environment variable LMDEPLOY_VICO_VISION_DEVICE.',
        ),
        (
            (),
            {'LMDEPLOY_VICO_VISION_DEVICE': 'cpu', 'LMDEPLOY_VICO_KERNELS': 'triton'},
            "The Triton kernels were asked for, but they do not run on 'cpu' devices (on the CPU: with "
            'TRITON_INTERPRET=1, for tests). kernels is set by the environment variable LMDEPLOY_VICO_KERNELS.',
        ),
        (
            ('--hf-overrides', '{"vico": {"vit_speedups": "cudnn_attention", "vision_device": "cpu"}}'),
            {},
            'vit_speedups: cudnn_attention needs a CUDA device, and the vision side runs on cpu; leave it out. '
            'vit_speedups is set by --hf-overrides "vico".',
        ),
        (('--tp', '3'), {}, '--tp 3 does not work: 3 ranks cannot share 4 attention heads. 1, 2, 4 do.'),
    ],
)
def test_bad_options(refusal, make_checkpoint, arguments, environment, said):
    """One sentence, however many ranks there are, which says where a wrong value comes from."""
    assert refusal(make_checkpoint(), *arguments, **environment).startswith(f'lmdeploy-vico: {said}')
