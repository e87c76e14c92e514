"""On a CUDA device: the language model of a checkpoint on the real TurboMind, judged by the independent reference.

A tiny checkpoint is not made for TurboMind's kernels. ``benchmarks/on_gpu.sh checks-turbomind`` makes one of the 1B
size with random weights and names it in ``VICO_TURBOMIND_CHECKPOINT``.
"""

import os

import pytest
import torch
from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from parity.judge import TOKENS, Answer, Judge

CHECKPOINT = os.environ.get('VICO_TURBOMIND_CHECKPOINT', '')
GREEDY = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason='no CUDA device, or hidden: VICO_TEST_DEVICE=cuda shows it'
    ),
    pytest.mark.skipif(not CHECKPOINT, reason='VICO_TURBOMIND_CHECKPOINT names no checkpoint'),
]


@pytest.fixture(scope='module')
def turbomind():
    """The vision side in float32, so that what is judged is what TurboMind makes of the visual tokens."""
    config = TurbomindEngineConfig(max_batch_size=32, session_len=16384, cache_max_entry_count=0.2)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv('LMDEPLOY_VICO_LANGUAGE_ENGINE', 'turbomind')
        environment.setenv('LMDEPLOY_VICO_VISION_DEVICE', 'cpu')
        with pipeline(CHECKPOINT, backend_config=config) as pipe:
            yield pipe


def test_answers_alone_and_together(turbomind, prompts):
    assert type(turbomind.async_engine.engine).__name__ == 'TurboMind'
    judge = Judge(CHECKPOINT)
    together = turbomind(list(prompts.values()), gen_config=GREEDY)
    alone = [turbomind([messages], gen_config=GREEDY)[0] for messages in prompts.values()]
    for answers in (together, alone):
        for (name, messages), answer in zip(prompts.items(), answers, strict=True):
            judge.check(messages, Answer(tuple(answer.token_ids), answer.input_token_len), name=name)
