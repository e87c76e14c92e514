"""Whatever a request asks for, it is refused with a sentence, or LMDeploy's own sampling can do it."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmdeploy.messages import GenerationConfig
from lmdeploy.pytorch.backends.default.multinomial_sampling import DefaultMultinomialSamplingImpl
from lmdeploy.pytorch.engine import logits_process
from lmdeploy.pytorch.engine.logits_process import FusedLogitsProcessor
from lmdeploy.pytorch.messages import SamplingParam
from lmdeploy.pytorch.strategies.ar.model_agent import ARStoppingCriteria
from lmdeploy.pytorch.strategies.ar.sampling import ARSamplingStrategy

from lmdeploy_vico.adapter.server.generation.bias import LogitBias
from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.generation.parameters import TABLE, check_tokens, fit
from lmdeploy_vico.adapter.server.generation.rules import Limits

VOCABULARY, CONTEXT = 48, 100
LIMITS = Limits(vocabulary=VOCABULARY, context=CONTEXT)
END = 7  # the token that LMDeploy adds to the stop words of every request
SO_FAR = [3, 4, 3, 4, 3, 4]  # generated before, with repetitions to be found

INTEGERS = st.sampled_from(
    [0, 1, 2, 3, 47, 48, 49, 100, 101, 1024, 1025, 4096, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -1, -(2**63)]
)
TINY = (0.0, 1e-320, 1e-46, 1e-45, 1e-30, 1e-8, 1e-4, 0.01)
HUGE = (1e2, 1e4, 1e30, 1e39, 1e300, math.inf)
REALS = st.sampled_from([*TINY, 0.5, 1.0, 1.5, 2.0, *HUGE, -0.0, -1.0, -math.inf, math.nan])
IDS = st.lists(st.integers(-1, VOCABULARY), max_size=60)
ANYTHING = st.one_of(INTEGERS, REALS, st.booleans(), st.none(), st.text(max_size=3), st.just({}), IDS)
BIASES = st.dictionaries(st.integers(-1, VOCABULARY), st.floats(-100, 100), max_size=4)
TYPED = {
    **dict.fromkeys(['top_p', 'min_p', 'temperature', 'repetition_penalty'], REALS),
    **dict.fromkeys(['top_k', 'max_new_tokens', 'min_new_tokens', 'random_seed', 'logprobs'], INTEGERS),
    **dict.fromkeys(['stop_token_ids', 'bad_token_ids'], IDS),
    'repetition_ngram_size': st.sampled_from([0, 1, 2, 3, 1024, 1025, 2**63]),
    'repetition_ngram_threshold': st.sampled_from([0, 1, 2, 2**31, 2**63]),
    'logits_processors': BIASES.map(lambda bias: [LogitBias(tuple(bias), tuple(bias.values()))]),
    'ignore_eos': st.booleans(),
    'do_sample': st.booleans(),
}
TOGETHER = (('repetition_ngram_size', 'repetition_ngram_threshold'), ('stop_token_ids', 'ignore_eos'))
CHOICES = [(field,) for field in TYPED] * 2 + [*TOGETHER] * 2


@st.composite
def requests(draw):
    """A config with extreme values, some of which LMDeploy's own constructor would refuse."""
    config = GenerationConfig(do_sample=True)
    for fields in draw(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=3)):
        for field in fields:
            setattr(config, field, draw(TYPED[field]))
    if draw(st.integers(0, 9)) == 0:
        field = draw(st.sampled_from([field for field in TABLE if field != 'logits_processors']))
        setattr(config, field, draw(ANYTHING))
    return config


def sequence(param, number):
    return SimpleNamespace(
        sampling_param=param,
        num_valid_ids=len(SO_FAR) + 2,
        valid_ids=np.array([1, 2, *SO_FAR]),
        num_new_tokens=len(SO_FAR),
        generated_ids=np.array(SO_FAR),
        session=SimpleNamespace(session_id=number),
        seq_id=0,
    )


def as_lmdeploy_completes(config):
    """What AsyncEngine makes of a config before it hands it over."""
    config.stop_token_ids = [*(config.stop_token_ids or []), END]
    check_tokens(config, LIMITS)
    if config.max_new_tokens is None:
        config.max_new_tokens = CONTEXT
    if not config.do_sample:
        config.top_k, config.temperature, config.repetition_penalty = 1, 1.0, 1.0
    return config


async def sample(params, logits):
    """LMDeploy's own code, from parameters to tokens, for a batch."""
    sequences = [sequence(param, number) for number, param in enumerate(params)]
    inputs = ARSamplingStrategy(pad_token_id=0).make_sampling_inputs(sequences).to_device('cpu')
    left = torch.tensor([each.sampling_param.max_new_tokens - each.num_new_tokens for each in sequences])
    ARStoppingCriteria(num_appendable_ids=left)
    processor = FusedLogitsProcessor(inputs, logprobs_mode='raw_logprobs')
    scores, logprobs = await processor(logits.clone())
    assert not scores.isnan().any()
    tokens = processor.sampling(scores)
    processor.compute_logprobs(logprobs, tokens)
    return tokens


def run(coroutine):
    """The coroutine waits for nothing on a CPU."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


@pytest.fixture(autouse=True, scope='module')
def cpu_sampling():
    """torch's own sampling, which raises if a probability is not a number, as no GPU kernel does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_process, '_multinomial_sampling', DefaultMultinomialSamplingImpl().forward)
        patch.setattr(FusedLogitsProcessor, '_wait_stream_once', _nothing)
        yield


async def _nothing(self):
    del self


def test_every_field_has_a_rule():
    assert set(TABLE) == {field.name for field in dataclasses.fields(GenerationConfig)}


@settings(max_examples=1500, deadline=None)
@given(config=requests(), seed=st.integers(0, 100), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_refused_or_done(config, seed, scale):
    try:
        fitted = as_lmdeploy_completes(fit(config, LIMITS))
    except ParameterError as error:
        message = str(error)
        assert message.endswith('.') and len(message) < 300, message
        return
    ordinary = as_lmdeploy_completes(fit(GenerationConfig(do_sample=True, ignore_eos=True), LIMITS))
    params = [SamplingParam.from_gen_config(each) for each in (fitted, ordinary)]
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale
    for batch in (params, params[:1], params[::-1]):
        tokens = run(sample(batch, logits[: len(batch)]))
        assert ((tokens >= 0) & (tokens < VOCABULARY)).all()


@pytest.mark.parametrize(
    'asked, given',
    [
        ({'top_k': 5}, {'top_k': 5}),
        ({'top_k': VOCABULARY}, {'top_k': 0}),
        ({'top_k': 2**63}, {'top_k': 0}),
        ({'max_new_tokens': 2**70}, {'max_new_tokens': CONTEXT}),
        ({'max_new_tokens': None}, {'max_new_tokens': None}),
        ({'temperature': 1e-9}, {'temperature': 0.0}),
        ({'temperature': 0.001}, {'temperature': 0.01}),
        ({'random_seed': -1}, {'random_seed': 2**64 - 1}),
        ({'random_seed': 2**64}, {'random_seed': 0}),
        ({'stop_words': 'end'}, {'stop_words': ['end']}),
        ({'logprobs': 0}, {'logprobs': 0}),
    ],
    ids=str,
)
def test_clamped(asked, given):
    config = GenerationConfig()
    vars(config).update(asked)
    fitted = fit(config, LIMITS)
    assert {name: getattr(fitted, name) for name in given} == given
    assert vars(config) == vars(GenerationConfig()) | asked, 'the caller keeps its config'


@pytest.mark.parametrize(
    'asked, message',
    [
        ({'temperature': math.nan}, 'temperature must be a number from 0 to 2, not nan.'),
        ({'logprobs': VOCABULARY + 1}, 'The number of logprobs must be an integer from 0 to 48, not 49.'),
        ({'stop_token_ids': [VOCABULARY]}, 'An item of stop_token_ids must be an integer from 0 to 47, not 48.'),
        ({'min_new_tokens': 6, 'max_new_tokens': 5}, 'min_new_tokens must be at most max_tokens, 5, not 6.'),
        ({'stop_words': ['']}, "An item of stop must be a text that is not empty, not ''."),
        ({'stop_words': ['x'] * 17}, 'stop must have at most 16 items, not 17.'),
        ({'random_seed': 1.5}, 'seed must be an integer, not 1.5.'),
        ({'n': 2}, 'n must be 1 here, not 2: /v1/chat/completions gives several choices.'),
        ({'top_p': 10**400}, 'top_p must be a number from 0 to 1, not an integer of 1329 bits.'),
        (
            {'bad_token_ids': 'x' * 100},
            f"bad_token_ids must be a list, not '{'x' * 80}'... (100 characters).",
        ),
        (
            {'repetition_ngram_size': 2, 'repetition_ngram_threshold': 2, 'ignore_eos': True},
            'repetition_ngram_size ends an answer with its end token, so it cannot be used with ignore_eos, '
            'min_new_tokens or bad words that contain it.',
        ),
        (
            {'logits_processors': [LogitBias((VOCABULARY,), (1.0,))]},
            'A token id of logit_bias must be an integer from 0 to 47, not 48.',
        ),
    ],
    ids=str,
)
def test_refused(asked, message):
    config = GenerationConfig()
    vars(config).update(asked)
    with pytest.raises(ParameterError) as error:
        fit(config, LIMITS)
    assert str(error.value) == message


@pytest.mark.parametrize('field', ['with_cache', 'preserve_cache', 'migration_request'])
def test_keys_of_disaggregated_serving(field):
    config = GenerationConfig()
    for value in (None, False):
        setattr(config, field, value)
        fit(config, LIMITS)
    for value in (True, {}, 0, ''):
        setattr(config, field, value)
        with pytest.raises(ParameterError, match=rf'{field} is not available: this server has no role in disagg'):
            fit(config, LIMITS)
        assert getattr(fit(config, dataclasses.replace(LIMITS, disaggregated=True)), field) == value


def test_what_the_server_does_not_compute():
    for field in ('logprobs', 'return_routed_experts'):
        config = GenerationConfig()
        setattr(config, field, True if field == 'return_routed_experts' else 1)
        with pytest.raises(ParameterError, match='is not available: this server'):
            fit(config, dataclasses.replace(LIMITS, logprobs=False, routed_experts=False))


def test_a_token_is_left():
    everything = list(range(VOCABULARY))
    config = GenerationConfig(stop_token_ids=everything[:20], bad_token_ids=everything[20:])
    with pytest.raises(ParameterError, match='leave no token'):
        check_tokens(config, LIMITS)
    config.bad_token_ids = everything[21:]
    check_tokens(config, LIMITS)


def test_repetitions_need_the_end_token():
    config = GenerationConfig(stop_token_ids=[3], repetition_ngram_size=2, repetition_ngram_threshold=2)
    check_tokens(config, LIMITS)
    config.bad_token_ids = [3]
    with pytest.raises(ParameterError, match='bad words that contain it'):
        check_tokens(config, LIMITS)


@pytest.mark.parametrize(
    'asked',
    [
        {'logits_processors': [LogitBias((3,), (1.0,))]},
        {'repetition_ngram_size': 2, 'repetition_ngram_threshold': 2},
        {'logprob_start_len': 0, 'logprobs': 1},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_turbomind_would_ignore_is_refused(asked):
    on_turbomind = dataclasses.replace(LIMITS, turbomind=True)
    config = GenerationConfig(**asked)
    fit(config, LIMITS)
    with pytest.raises(ParameterError, match="is not available: TurboMind, which runs this server's language model"):
        fit(config, on_turbomind)
    fit(GenerationConfig(do_sample=True, logprobs=3, min_new_tokens=2, bad_token_ids=[5]), on_turbomind)


@pytest.mark.parametrize('field', ['stop_token_ids', 'bad_token_ids'])
def test_turbomind_looks_at_few_tokens(field):
    on_turbomind = dataclasses.replace(LIMITS, turbomind=True)
    config = GenerationConfig(**{field: [*range(32), 31]})
    check_tokens(config, on_turbomind)
    setattr(config, field, list(range(33)))
    with pytest.raises(ParameterError, match='may be at most 32 tokens.*TurboMind'):
        check_tokens(config, on_turbomind)
    check_tokens(config, LIMITS)


BIG = Limits(vocabulary=151936, context=CONTEXT, turbomind=True)


@pytest.mark.parametrize('top_k', [1025, 4096, 151935])
def test_a_top_k_that_ends_turbomind_is_refused(top_k):
    config = GenerationConfig(top_k=top_k)
    assert fit(config, dataclasses.replace(BIG, turbomind=False)).top_k == top_k
    with pytest.raises(ParameterError) as error:
        fit(config, BIG)
    assert str(error.value) == (
        f"top_k must be at most 1024, or 0 for no limit, not {top_k}: TurboMind, which runs this server's language "
        'model, takes no more.'
    )


@pytest.mark.parametrize('top_k, given', [(0, 0), (1, 1), (1024, 1024), (151936, 0), (151937, 0), (2**70, 0)])
def test_what_turbomind_gets_as_top_k(top_k, given):
    assert fit(GenerationConfig(top_k=top_k), BIG).top_k == given


@settings(max_examples=300, deadline=None)
@given(config=requests(), top_k=st.one_of(INTEGERS, st.integers(1000, 2000)))
def test_turbomind_never_gets_a_top_k_that_ends_it(config, top_k):
    config.top_k = top_k
    try:
        fitted = as_lmdeploy_completes(fit(config, BIG))
    except ParameterError as error:
        message = str(error)
        assert message.endswith('.') and len(message) < 300, message
        return
    assert 0 <= fitted.top_k <= 1024 and fitted.temperature > 0


@pytest.mark.parametrize(
    'greedy',
    [{'temperature': 0.0}, {'temperature': 1e-9}, {'top_k': 1}, {'do_sample': False}, {'top_p': 0.0}, {'min_p': 1.0}],
    ids=str,
)
def test_turbomind_has_no_log_probabilities_of_greedy_answers(greedy):
    config = GenerationConfig(**{'do_sample': True, 'logprobs': 1, **greedy})
    fit(config, dataclasses.replace(BIG, turbomind=False))
    with pytest.raises(ParameterError, match='Log probabilities need sampling here.*TurboMind.*PyTorch engine'):
        fit(config, BIG)
    for none in (None, 0):
        fit(dataclasses.replace(config, logprobs=none), BIG)


@pytest.mark.parametrize('sampled', [{}, {'top_k': 2}, {'top_k': 0}, {'top_p': 0.01}, {'min_p': 0.9}], ids=str)
def test_turbomind_has_those_of_sampled_ones(sampled):
    assert fit(GenerationConfig(do_sample=True, logprobs=20, **sampled), BIG).logprobs == 20


@pytest.mark.parametrize('banning', [{'min_new_tokens': 1}, {'bad_words': ['x']}, {'bad_token_ids': [3]}], ids=str)
def test_turbomind_is_always_left_a_token_that_a_grammar_allows(banning):
    config = GenerationConfig(response_format={'type': 'regex_schema', 'regex_schema': 'a'}, **banning)
    fit(config, dataclasses.replace(BIG, turbomind=False))
    with pytest.raises(
        ParameterError, match='response_format cannot be used with min_new_tokens, bad_words or bad_tok'
    ):
        fit(config, BIG)
    fit(dataclasses.replace(config, response_format=None), BIG)
    fit(GenerationConfig(response_format=config.response_format, min_new_tokens=0, bad_words=[]), BIG)


@pytest.mark.parametrize('temperature', [0.0, 1e-9])
def test_turbomind_does_not_divide_by_zero(temperature):
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=40, repetition_penalty=1.1)
    assert fit(config, LIMITS).temperature == 0
    fitted = fit(config, dataclasses.replace(LIMITS, turbomind=True))
    assert (fitted.top_k, fitted.temperature, fitted.repetition_penalty) == (1, 1.0, 1.1)
