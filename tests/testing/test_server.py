"""The server runs where LMDeploy has no command beside the interpreter, as after ``pip install --target``."""

import os
import sys
import sysconfig
import urllib.request
from pathlib import Path

from lmdeploy_vico.testing.server import ApiServer

ROOT = Path(__file__).parents[2]


def test_command_beside_the_interpreter(tmp_path, monkeypatch, make_checkpoint):
    bare = tmp_path / 'python'
    bare.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, 'executable', str(bare))
    # What is installed is found by its path alone, and so are entry points.
    environment = {'PYTHONPATH': os.pathsep.join([str(ROOT), sysconfig.get_path('purelib')])}
    with ApiServer(make_checkpoint(), log=tmp_path / 'log', environment=environment) as server:
        assert server.command[0] == 'lmdeploy', 'what a user would type'
        assert 'vision side on' in server.log_text()
        with urllib.request.urlopen(f'{server.url}/v1/models') as answer:
            assert answer.status == 200
    (tmp_path / 'lmdeploy').write_text('#!/bin/sh\necho beside\n')
    (tmp_path / 'lmdeploy').chmod(0o755)
    server = ApiServer('x', log=tmp_path / 'log', timeout=20)
    server.start()
    assert server.wait_until_ended() == 0
    assert server.log_text() == 'beside\n'
