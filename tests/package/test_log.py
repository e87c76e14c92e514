"""The log's set-up, each case in a process of its own: pytest configures logging itself."""

import subprocess
import sys

import pytest

SAY = 'import logging, lmdeploy_vico.log as log; {}; logging.getLogger("lmdeploy_vico.stage").info("loaded")'


@pytest.mark.parametrize(
    'before, shown',
    [
        ('log.setup()', 'lmdeploy_vico.stage - INFO - loaded'),
        ('log.setup(); log.setup()', 'lmdeploy_vico.stage - INFO - loaded'),
        ('logging.getLogger("lmdeploy").setLevel("ERROR"); log.setup()', 'lmdeploy_vico.stage - INFO - loaded'),
        ('logging.basicConfig(level="INFO", format="%(message)s!"); log.setup()', 'loaded!'),
        ('logging.basicConfig(level="ERROR"); log.setup()', ''),
        ('logging.getLogger(log.NAME).setLevel("ERROR"); log.setup()', ''),
        ('None', ''),
    ],
)
def test_what_is_shown(before, shown):
    out = subprocess.run([sys.executable, '-c', SAY.format(before)], capture_output=True, text=True, check=True)
    assert out.stderr.strip().endswith(shown) and len(out.stderr.splitlines()) == bool(shown)
    assert out.stdout == ''
