"""What a process that decodes has of its server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from media.files import encoded, noise

from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.media.workers.confinement import CLONE_NEWNET, CLONE_NEWUSER, environment
from lmdeploy_vico.media.workers.worker import Job, Worker

# What the kernel lets a process of this user do that has one thread.
UNSHARE = 'import ctypes, sys; sys.exit(-ctypes.CDLL(None).unshare(int(sys.argv[1])))'


@pytest.fixture
def process(monkeypatch):
    """What the kernel tells of a process that has decoded a picture: a directory of /proc."""
    monkeypatch.setenv('LMDEPLOY_API_KEYS', 'sk-very-secret')
    worker = Worker(None)
    worker.decode(Job(encoded(noise(), 'PNG'), PictureOptions(), None, lambda width, height: 0, 10))
    yield Path('/proc') / str(worker._process.pid)
    worker.stop()


def test_only_what_is_needed_of_the_environment():
    secret = {'LMDEPLOY_API_KEYS': 'a', 'HF_TOKEN': 'b', 'HTTPS_PROXY': 'c', 'HOME': 'd', 'PYTHONPATH': 'e'}
    kept = {'PATH': 'f', 'LD_LIBRARY_PATH': 'g', 'LANG': 'h', 'LC_ALL': 'i', 'OPENCV_FFMPEG_THREADS': '2'}
    found = environment({**secret, **kept}, ['', '/a', '/b'])
    assert kept.items() <= found.items() and found['PYTHONPATH'] == '/a:/b'
    assert not (secret.keys() - {'PYTHONPATH'}) & found.keys()


def test_no_secrets_and_no_new_privileges(process):
    assert b'secret' not in (process / 'environ').read_bytes()
    assert 'NoNewPrivs:\t1\n' in (process / 'status').read_text()


def test_no_network_where_the_kernel_allows_that(process):
    flags = CLONE_NEWNET | (CLONE_NEWUSER if os.geteuid() else 0)
    allowed = subprocess.run([sys.executable, '-S', '-c', UNSHARE, str(flags)]).returncode == 0
    own = os.readlink(process / 'ns/net') != os.readlink('/proc/self/ns/net')
    assert own == allowed
    if own and os.geteuid():
        assert 'CapEff:\t0000000000000000\n' in (process / 'status').read_text()
