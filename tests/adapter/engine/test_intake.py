"""LMDeploy's own engine, without its model, takes requests of which some cannot be taken."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch.config import CacheConfig, ModelConfig, SchedulerConfig
from lmdeploy.pytorch.engine.engine import Engine
from lmdeploy.pytorch.engine.request import Request, RequestManager, RequestType, Response
from lmdeploy.pytorch.messages import SamplingParam, SequenceMeta
from lmdeploy.pytorch.paging.scheduler import Scheduler
from lmdeploy.pytorch.strategies.ar import ARStrategyFactory

from lmdeploy_vico.adapter.engine import intake


class FailingProcessor:
    """Takes multimodal input that says it is good."""

    def preprocess_input(self, input_ids, input_multimodals):
        if input_multimodals != ['good']:
            raise RuntimeError('no such span')
        return SimpleNamespace(input_ids=input_ids, input_multimodals=None)


@pytest.fixture
def engine(make_checkpoint):
    return make_engine(make_checkpoint())


def make_engine(checkpoint):
    engine = Engine.__new__(Engine)  # __init__ would load the model
    model = ModelConfig.from_pretrained(str(checkpoint), dtype='bfloat16', trust_remote_code=True)
    strategies = ARStrategyFactory(model)
    engine.executor = SimpleNamespace(model_config=model)
    engine.engine_config = PytorchEngineConfig()
    engine.cache_config = CacheConfig(max_batches=8, block_size=16, num_cpu_blocks=0, num_gpu_blocks=64)
    engine.sampling_strategy = strategies.build_sampling_strategy()
    engine.model_agent_strategy = strategies.build_model_agent_strategy()
    meta = SequenceMeta(16, strategies.build_sequence_strategy(), engine.sampling_strategy)
    engine.scheduler = Scheduler(SchedulerConfig(max_batches=8, max_session_len=512), engine.cache_config, meta)
    engine.input_processor = FailingProcessor()
    engine.max_session_len = 512
    engine.req_manager = RequestManager()
    return engine


def request(engine, number, session=True, **data):
    if session:
        engine.scheduler.add_session(number)
    answer = Response(ResponseType.SUCCESS, sender_id=0, event=asyncio.Event())
    param = SamplingParam.from_gen_config(GenerationConfig())
    for name in list(data):
        if hasattr(param, name):
            setattr(param, name, data.pop(name))
    content = {'session_id': number, 'token_ids': [1, 2, 3], 'sampling_param': param, 'adapter_name': None, **data}
    return Request(RequestType.ADD_MESSAGE, sender_id=0, data=content, resp=answer)


BAD = {
    'no tokens': {'token_ids': []},
    'multimodal data that cannot be read': {'input_multimodals': ['bad']},
    'an overflow in sampling': {'top_k': 2**63, 'random_seed': 3},
    'an overflow where it stops': {'max_new_tokens': -(2**64)},
    'no list of stop words': {'stop_words': None},
    'no number': {'temperature': 'warm'},
    'no sampling parameters': {'sampling_param': object()},
}


@pytest.mark.parametrize('bad', BAD.values(), ids=BAD.keys())
def test_a_request_that_cannot_be_taken_fails_alone(engine, bad, caplog):
    before = request(engine, 1, input_multimodals=['good'])
    failing = request(engine, 2, **bad)
    after = request(engine, 3)
    gone = request(engine, 4, session=False)
    with caplog.at_level(logging.ERROR, logger=intake.__name__):
        engine._on_add_message([before, failing, after, gone])
    assert failing.resp.event.is_set() and failing.resp.type == ResponseType.INTERNAL_ENGINE_ERROR
    assert gone.resp.event.is_set() and gone.resp.type == ResponseType.SESSION_NOT_EXIST
    assert not before.resp.event.is_set() and not after.resp.event.is_set()
    assert set(engine.scheduler.sessions) == {1, 3}
    assert [seq.session_id for seq in engine.scheduler.waiting] == [1, 3]
    assert len([record for record in caplog.records if record.name == intake.__name__]) == 1
    sequences = list(engine.scheduler.waiting)
    inputs = engine.sampling_strategy.make_sampling_inputs(sequences)
    assert inputs.batch_size == 2
    assert inputs.session_to_cleanup == [2], 'what the batches have to clean up is not lost to the trial'


def test_a_prompt_that_leaves_no_room_is_too_long(engine):
    lengths = {1: 511, 2: 512, 3: 513}
    requests = [request(engine, number, token_ids=[1] * length) for number, length in lengths.items()]
    scored = request(engine, 4, token_ids=[1] * 512, max_new_tokens=0)
    engine._on_add_message([*requests, scored])
    assert [seq.session_id for seq in engine.scheduler.waiting] == [1, 4]
    assert [one.resp.type for one in requests[1:]] == [ResponseType.INPUT_LENGTH_ERROR] * 2
    assert all(one.resp.event.is_set() for one in requests[1:])


def test_an_error_is_explained_once(engine, caplog, monkeypatch):
    monkeypatch.setattr(intake, '_explained', set())
    with caplog.at_level(logging.ERROR, logger=intake.__name__):
        engine._on_add_message([request(engine, number, token_ids=[]) for number in range(3)])
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False]


def test_other_models_keep_lmdeploys_behaviour(make_checkpoint):
    engine = make_engine(make_checkpoint(flash=False))
    assert not intake.serves_vico(engine)
    with pytest.raises(AssertionError, match='Empty input'):
        engine._on_add_message([request(engine, 1, token_ids=[])])
