"""The log's set-up, each case in a process of its own: pytest configures logging itself."""

import subprocess
import sys

import pytest

SAY = 'import logging, lmdeploy_vico.log as log; {}; logging.getLogger("lmdeploy_vico.stage").info("loaded")'


def run(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    'before, shown',
    [
        ('log.setup()', 'lmdeploy-vico - INFO - loaded'),
        ('log.setup(); log.setup()', 'lmdeploy-vico - INFO - loaded'),
        ('logging.getLogger("lmdeploy").setLevel("ERROR"); log.setup()', 'lmdeploy-vico - INFO - loaded'),
        ('logging.basicConfig(level="INFO", format="%(message)s!"); log.setup()', 'loaded!'),
        ('logging.basicConfig(level="ERROR"); log.setup()', ''),
        ('logging.getLogger(log.NAME).setLevel("ERROR"); log.setup()', ''),
        ('None', ''),
    ],
)
def test_what_is_shown(before, shown):
    out = run(SAY.format(before))
    assert out.stderr.strip().endswith(shown) and len(out.stderr.splitlines()) == bool(shown)
    assert out.stdout == ''


def test_a_line_about_a_request_has_its_id():
    said = 'logging.getLogger("lmdeploy_vico.stage").warning("lost %d", 1)'
    out = run(f'import logging, lmdeploy_vico.log as log; log.setup()\nwith log.about("id-7"): {said}\n{said}')
    assert [line.partition(' - ')[2] for line in out.stderr.splitlines()] == [
        'lmdeploy-vico - WARNING - [id-7] lost 1',
        'lmdeploy-vico - WARNING - lost 1',
    ]


def test_the_cpu_backend_announces_itself_in_the_log_where_no_vico_model_has_set_it_up():
    [line] = run('from lmdeploy_vico.cpu import selection as s; s.announce(); s.announce()').stderr.splitlines()
    assert line.endswith('lmdeploy-vico - WARNING - no CUDA device: running on the CPU reference backend')
