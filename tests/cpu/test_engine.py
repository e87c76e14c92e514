"""LMDeploy's engine on the CPU backend, through ``lmdeploy.pipeline``, against transformers without a cache."""

import random

import pytest
import torch
from cpu.tiny_text import SHAPE, load_reference, worst_gap
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

# A token this close to the reference's best, in standard deviations of the logits, is a tie and not an error.
TIE = 0.05
VOCABULARY = SHAPE['vocab_size']
MOST = 32  # sequences of a batch
TEXT = 'the quick brown fox jumps over the lazy dog and {} '

pytestmark = pytest.mark.server


def ask(pipe, prompts, adapter_name=None, **options):
    """Greedy answers to raw prompts, unless the options say otherwise."""
    return pipe(prompts, gen_config=greedy(**options), do_preprocess=False, adapter_name=adapter_name)


def greedy(**options):
    defaults = {'max_new_tokens': 12, 'do_sample': False, 'ignore_eos': True, 'logprobs': 5}
    return GenerationConfig(**(defaults | options))


def prompts(count, repeat=1):
    return [TEXT.format(i) * (repeat + i % 5) for i in range(count)]


def seen(answer):
    """Everything an answer shows of the logits: its tokens and their log-probabilities, bit for bit."""
    assert len(answer.logprobs) == len(answer.token_ids)
    return answer.token_ids, answer.logprobs


def test_dense_matches_transformers(dense, dense_checkpoint, tokenizer):
    reference = load_reference(dense_checkpoint)
    for prompt, answer in zip(prompts(4), ask(dense, prompts(4)), strict=True):
        ids = tokenizer.encode(prompt)
        assert answer.input_token_len == len(ids)
        assert len(answer.token_ids) == 12
        assert worst_gap(reference, ids, answer.token_ids) < TIE


def test_moe_matches_transformers(moe, moe_checkpoint, tokenizer):
    reference = load_reference(moe_checkpoint)
    for prompt, answer in zip(prompts(4), ask(moe, prompts(4)), strict=True):
        assert worst_gap(reference, tokenizer.encode(prompt), answer.token_ids) < TIE


def test_lora_matches_merged_weights(dense, dense_checkpoint, adapter, tokenizer):
    reference = load_reference(dense_checkpoint, adapter)
    plain = ask(dense, prompts(3))
    adapted = ask(dense, prompts(3), adapter_name='tiny')
    for prompt, without, answer in zip(prompts(3), plain, adapted, strict=True):
        assert worst_gap(reference, tokenizer.encode(prompt), answer.token_ids) < TIE
        assert answer.token_ids != without.token_ids


def test_chunked_prefill(dense, dense_checkpoint, tokenizer):
    prompt = ''.join(TEXT.format(i) for i in range(40))
    ids = tokenizer.encode(prompt)
    assert len(ids) > 512
    answer = ask(dense, prompt)
    assert answer.input_token_len == len(ids)
    assert worst_gap(load_reference(dense_checkpoint), ids, answer.token_ids) < TIE


def test_prefix_caching(dense, tokenizer):
    prompt = 'cached: ' + TEXT.format('again') * 12
    length = len(tokenizer.encode(prompt))
    first = ask(dense, prompt)
    second = ask(dense, prompt)
    assert first.cached_tokens == 0
    assert second.cached_tokens == (length - 1) // 64 * 64 > 0
    assert second.token_ids == first.token_ids


@pytest.mark.parametrize('kind', ['dense', 'bfloat16', 'moe', 'moe_bfloat16'])
def test_alone_and_in_random_company(kind, request):
    """Bit for bit the same, however the batch changes while a prompt is prefilled and its answer is decoded.

    Batches hold 1 to 32 sequences, which end at different times and make room for others. The dense model also cuts
    long prompts into chunks, wherever the budget of a step is spent, and finds the beginnings of some in its cache.
    """
    pipe = request.getfixturevalue(kind)
    order = random.Random(kind)
    beginnings = [f'{kind} {i}: ' + TEXT.format(i) * 6 for i in range(3)]
    lengths = [0, 1, 2, 3, 5, 9, 16, 40, 130, 700]
    asked = [
        order.choice(beginnings)[: 2 + i % 5 * 60] + 'fox ' * order.choice(lengths) + str(i) for i in range(MOST + 2)
    ]
    tokens = [1 + order.randrange(16) for _ in asked]
    alone = {}
    for size in (MOST + 2, 2, 7):  # the first time in company: nothing of it is cached
        some = order.sample(range(len(asked)), size)
        options = [greedy(max_new_tokens=tokens[i], logprobs=VOCABULARY) for i in some]
        answers = pipe([asked[i] for i in some], gen_config=options, do_preprocess=False)
        for i, answer in zip(some, answers, strict=True):
            if i not in alone:
                alone[i] = ask(pipe, asked[i], max_new_tokens=tokens[i], logprobs=VOCABULARY)
                assert [len(step) for step in alone[i].logprobs] == [VOCABULARY] * tokens[i]
            assert seen(answer) == seen(alone[i]), asked[i]


def test_sampling_repeats_with_a_seed(dense):
    options = {'do_sample': True, 'temperature': 1.5, 'top_k': 40, 'top_p': 0.95, 'min_p': 0.001}
    asked = prompts(6)
    first = ask(dense, asked, random_seed=7, **options)
    again = ask(dense, asked, random_seed=7, **options)
    alone = ask(dense, asked[3], random_seed=7, **options)
    other = ask(dense, asked, random_seed=8, **options)
    assert [seen(a) for a in first] == [seen(a) for a in again]
    assert seen(alone) == seen(first[3])
    assert [a.token_ids for a in first] != [a.token_ids for a in other]
    assert len({tuple(a.token_ids) for a in first}) > 1


def test_bad_words(dense):
    greedy = ask(dense, TEXT)
    banned = ask(dense, TEXT, bad_token_ids=greedy.token_ids[:1])
    assert greedy.token_ids[0] not in banned.token_ids


def test_repetition_penalty(dense, dense_checkpoint, tokenizer):
    reference = load_reference(dense_checkpoint)
    ids = tokenizer.encode(TEXT)
    plain = ask(dense, TEXT).token_ids
    # LMDeploy drops the penalty of requests that do not sample.
    penalized = ask(dense, TEXT, do_sample=True, top_k=1, temperature=1.0, repetition_penalty=3.0).token_ids
    assert penalized != plain
    assert worst_gap(reference, ids, penalized, repetition_penalty=3.0) < TIE


def test_logits_processors(dense):
    def only(token_id):
        def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, -1e4)
            forced[token_id] = 0
            return forced

        return process

    answer = ask(dense, TEXT, logits_processors=[only(100)], max_new_tokens=4)
    assert answer.token_ids == [100] * 4


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'quant_policy': 8}, 'does not support a quantized KV cache'),
        ({'ep': 2}, 'does not support expert parallelism'),
    ],
)
def test_unsupported_requests_are_refused(dense_checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        pipeline(str(dense_checkpoint), backend_config=PytorchEngineConfig(**options))


def test_tensor_parallel(moe_checkpoint, tokenizer):
    config = PytorchEngineConfig(session_len=1024, tp=2)
    with pipeline(str(moe_checkpoint), backend_config=config) as pipe:
        answers = ask(pipe, prompts(3))
    reference = load_reference(moe_checkpoint)
    for prompt, answer in zip(prompts(3), answers, strict=True):
        assert worst_gap(reference, tokenizer.encode(prompt), answer.token_ids) < TIE
