"""``lmdeploy.pipeline`` on the stand-in for TurboMind's binding, in a process that finds it."""

import json
import os
import subprocess
import sys

import pytest
from parity.judge import Answer
from serving.configurations import STAND_IN
from waiting import HANG

pytestmark = pytest.mark.server

NAMES = ('one photograph', 'two images with text between', 'text only')
CODE = f"""
import json, sys
from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from parity.conversations import conversations
from parity.judge import TOKENS
from PIL import Image
from skimage import data

names = 'astronaut', 'coffee', 'chelsea', 'page', 'rocket', 'text'
prompts = conversations({{name: Image.fromarray(getattr(data, name)()) for name in names}})
greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
config = TurbomindEngineConfig(session_len=8192, max_batch_size=4, hf_overrides={{'vico': {{'compression': 'all'}}}})
with pipeline(sys.argv[1], backend_config=config) as pipe:
    answers = pipe([prompts[name] for name in {NAMES}], gen_config=greedy)
    print(json.dumps([[answer.token_ids, answer.input_token_len] for answer in answers]))
"""


def test_answers_and_options_of_overrides(make_checkpoint, prompts, judge):
    command = [sys.executable, '-c', CODE, str(make_checkpoint())]
    done = subprocess.run(command, env={**os.environ, **STAND_IN}, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    for name, (ids, length) in zip(NAMES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        judge().check(prompts[name], Answer(tuple(ids), length), 'all', name=name)
