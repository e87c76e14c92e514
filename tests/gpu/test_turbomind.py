"""On a CUDA device: the language model of a checkpoint on the real TurboMind, judged by the independent reference.

A tiny checkpoint is not made for TurboMind's kernels. ``benchmarks/on_gpu.sh checks-turbomind`` makes one of the 1B
size with random weights and names it in ``VICO_TURBOMIND_CHECKPOINT``.
"""

import dataclasses
import math
import os

import pytest
import torch
from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from parity.judge import TOKENS, Answer, Judge

CHECKPOINT = os.environ.get('VICO_TURBOMIND_CHECKPOINT', '')
GREEDY = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, do_sample=True, temperature=1.0, random_seed=5)
YES_OR_NO = {'type': 'regex_schema', 'regex_schema': '(yes|no)'}

BATCH = 32  # requests at a time, for each of which TurboMind has a handle

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
    config = TurbomindEngineConfig(max_batch_size=BATCH, session_len=16384, cache_max_entry_count=0.2)
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


def asked(turbomind, messages, config=GREEDY, **changed):
    return turbomind([messages], gen_config=dataclasses.replace(config, **changed))[0]


def test_a_grammar_guides_its_own_request_only(turbomind, prompts):
    messages = prompts['one photograph']
    free = asked(turbomind, messages)
    guided = asked(turbomind, messages, response_format=YES_OR_NO, ignore_eos=False)
    assert guided.text in ('yes', 'no') and guided.finish_reason == 'stop'
    for _ in range(BATCH + 1):  # so that the handle of the guided request is used again
        assert asked(turbomind, messages).token_ids == free.token_ids


def test_requests_with_and_without_a_grammar_side_by_side(turbomind, prompts):
    messages = prompts['one photograph']
    judge = Judge(CHECKPOINT)
    configs = [GREEDY, dataclasses.replace(GREEDY, response_format=YES_OR_NO, ignore_eos=False)] * 4
    answers = turbomind([messages] * len(configs), gen_config=configs)
    for answer in answers[::2]:
        judge.check(messages, Answer(tuple(answer.token_ids), answer.input_token_len))
    assert {answer.text for answer in answers[1::2]} <= {'yes', 'no'}


def test_what_would_end_the_process_is_refused(turbomind, prompts):
    """After it, the same engine answers with the largest ``top_k`` that its kernel takes, and with none."""
    messages = prompts['text only']
    refused = asked(turbomind, messages, SAMPLED, top_k=1025)
    assert refused.finish_reason == 'error' and 'top_k must be at most 1024' in refused.error_message
    for top_k in (1024, 0):
        assert len(asked(turbomind, messages, SAMPLED, top_k=top_k).token_ids) == TOKENS


def test_log_probabilities_are_those_of_the_kept_tokens(turbomind, prompts):
    messages = prompts['text only']
    answer = asked(turbomind, messages, SAMPLED, top_k=3, logprobs=20)
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, place in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token in place and len(place) <= 3
        assert sum(map(math.exp, place.values())) == pytest.approx(1, abs=1e-3)
    refused = asked(turbomind, messages, GREEDY, logprobs=1)
    assert refused.finish_reason == 'error' and 'Log probabilities need sampling here' in refused.error_message
