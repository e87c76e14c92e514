"""LMDeploy's own InternVL class in its flash mode on the CPU backend, as ``LMDEPLOY_VICO=cpu`` leaves it.

A plain checkpoint is asked in tests/serving/answers/test_plain_internvl.py.
"""

import os
import subprocess
import sys

import pytest
from waiting import HANG

pytestmark = pytest.mark.server

SCRIPT = """
import sys
import lmdeploy
import numpy
from PIL import Image

picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (448, 448, 3), numpy.uint8))
config = lmdeploy.PytorchEngineConfig(session_len=4096)
greedy = lmdeploy.GenerationConfig(max_new_tokens=6, do_sample=False, ignore_eos=True)
with lmdeploy.pipeline(sys.argv[1], backend_config=config, trust_remote_code=True) as pipe:
    model = pipe.async_engine.engine.executor.model_agent.patched_model.get_model()
    assert type(model).__module__ == 'lmdeploy.pytorch.models.internvl', type(model)
    asked = [('describe', picture), ('what is this', [picture, picture])]
    alone = [pipe(prompt, gen_config=greedy).token_ids for prompt in asked]
    together = [answer.token_ids for answer in pipe(asked, gen_config=greedy)]
    assert alone == together, (alone, together)
    assert all(len(tokens) == 6 for tokens in alone)
"""


def test_lmdeploys_own_class(make_checkpoint):
    result = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(make_checkpoint())],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        env=os.environ | {'LMDEPLOY_VICO': 'cpu'},
    )
    assert result.returncode == 0, result.stderr
