"""The text of an answer is the decoding of its tokens, wherever it is cut and however its tokens come."""

import asyncio
import random
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmdeploy.messages import EngineOutput, GenerationConfig, ResponseType
from lmdeploy.serve.core.async_engine import PreprocessedRequest
from lmdeploy.serve.core.vl_async_engine import VLAsyncEngine
from lmdeploy.serve.managers import SessionManager
from lmdeploy.tokenizer import DetokenizeState, Tokenizer
from lmdeploy.utils import get_logger

from lmdeploy_vico.adapter.server.generation.text import AnswerText, Detokenizer, is_byte_level

VOCABULARY = 931  # tokens of the tiny tokenizer; the model has more logits than that
ANSWERS = 600
TEXTS = (
    '这张照片里有一只橙色的猫、它坐在木桌上、旁边是一杯咖啡☕️和一把勺子。',
    '👩‍🚀🚀🌍 火箭升空了。👨‍👩‍👧‍👦 全家人都在看 🎆🎇、真壮观。🇨🇳🇫🇷',
    'Ωmega — naïve café, ﬁn. 日本語とEnglishと한국어 𠮷野家 𝄞 🤷🏽‍♀️',
)


@pytest.fixture(scope='module')
def tokenizer(make_checkpoint):
    return Tokenizer(str(make_checkpoint()))


@pytest.fixture(scope='module')
def transformers_tokenizer(tokenizer):
    return tokenizer.model.model


def test_the_tokenizer_is_byte_level(transformers_tokenizer):
    assert is_byte_level(transformers_tokenizer)
    assert not is_byte_level(object())


ids = st.lists(st.integers(0, VOCABULARY + 20), max_size=60)


@settings(max_examples=400, deadline=None)
@given(ids=ids, cuts=st.lists(st.integers(0, 60), max_size=20), prompt=ids, skip=st.booleans())
def test_pieces_are_a_beginning_of_the_decoding(transformers_tokenizer, ids, cuts, prompt, skip):
    detokenize = Detokenizer(transformers_tokenizer)
    state, text = DetokenizeState(len(prompt)), ''
    whole = transformers_tokenizer.decode(ids, skip_special_tokens=skip)
    for cut in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        piece, state = detokenize([*prompt, *ids[:cut]], state, skip_special_tokens=skip)
        text += piece
        assert whole.startswith(text)
        assert state.ids_offset == len(prompt) + cut
    assert len(whole) - len(text) <= 1, 'only what may become a character is kept'


def test_unfinished_characters_are_kept(transformers_tokenizer):
    detokenize = Detokenizer(transformers_tokenizer)
    state, pieces = AnswerText(0), []
    ids = transformers_tokenizer.encode('猫🚀', add_special_tokens=False)
    assert len(ids) == 7, 'no token of the tiny tokenizer has more than one of these bytes'
    for end in range(1, 8):
        piece, state = detokenize(ids[:end], state)
        pieces.append(piece)
    assert pieces == ['', '', '猫', '', '', '', '🚀']


class Handle:
    """Stands for the engine: gives the tokens of an answer in pieces of random length."""

    def __init__(self, ids, seed, end, prompt):
        self.ids, self.random, self.end, self.prompt = ids, random.Random(seed), end, prompt

    async def async_stream_infer(self, session_id, **arguments):
        assert arguments['input_ids'] == self.prompt
        ids = list(self.ids) + ([self.end] if self.end is not None else [])
        while True:
            size = self.random.choice([0, 1, 1, 2, 3, 7])
            piece, ids = ids[:size], ids[size:]
            await asyncio.sleep(0)  # others' pieces come in between
            status = ResponseType.SUCCESS if ids else ResponseType.FINISH
            yield EngineOutput(status, piece)
            if not ids:
                return

    async def async_cancel(self, session_id):
        pass


class Engine(VLAsyncEngine):
    """LMDeploy's engine with nothing but what it answers with."""

    def __init__(self, tokenizer, handles):
        # LMDeploy's own __init__, and the plugin's part of it, would load a model.
        self.tokenizer = SimpleNamespace(detokenize_incrementally=Detokenizer(tokenizer.model.model))
        self.tokenizer.decode = tokenizer.decode
        self.vico_generation = SimpleNamespace(tokenizer=tokenizer.model.model)
        self.session_mgr = SessionManager()
        self.session_mgr.request_handle_pool = SimpleNamespace(get=handles.pop, put=lambda handle: None)
        self.request_logger = SimpleNamespace(log_response=lambda *arguments: None)
        self.epoch, self.num_spec_token = 0, 0

    async def answer(self, prompt, **parameters):
        """The outputs of one request."""
        config = GenerationConfig(**parameters)
        request = PreprocessedRequest(self.session_mgr.get(), {'input_ids': prompt}, len(prompt), config, None)
        return [output async for output in self.generate(request)]


class Handles:
    """The handles of an engine, each for one request."""

    def __init__(self, handles):
        self._handles = handles

    async def pop(self):
        return self._handles.pop(0)


def answers(tokenizer, count):
    """Chinese, emoji and random tokens, cut at random places: prompt, ids, the token that ends it, parameters."""
    source = random.Random(5)
    end = tokenizer.eos_token_id
    for number in range(count):
        ids = tokenizer.encode(source.choice(TEXTS), add_bos=False)
        if number % 3 == 0:
            ids = [source.randrange(VOCABULARY) for _ in range(40)]
            ids = [token for token in ids if token != end]
        start = source.randrange(len(ids))
        ids = ids[start : source.randrange(start, len(ids)) + 1]
        parameters = {
            'skip_special_tokens': source.random() < 0.5,
            'include_stop_str_in_output': source.random() < 0.5,
            'stop_token_ids': [end],
        }
        prompt = tokenizer.encode('照', add_bos=False)[: source.randint(1, 3)]  # may end within a character
        yield prompt, ids, source.choice([None, end]), parameters


@pytest.mark.parametrize('together', [1, 16])
def test_answers_cut_anywhere(tokenizer, together, caplog):
    get_logger('lmdeploy')
    requests = list(answers(tokenizer, ANSWERS))
    cut = 0

    async def ask(batch):
        handles = [Handle(ids, number, end, prompt) for number, (prompt, ids, end, _) in enumerate(batch)]
        engine = Engine(tokenizer, Handles(handles))
        return await asyncio.gather(*(engine.answer(prompt, **parameters) for prompt, _, _, parameters in batch))

    for first in range(0, len(requests), together):
        batch = requests[first : first + together]
        for (_, ids, end, parameters), outputs in zip(batch, asyncio.run(ask(batch)), strict=True):
            text = ''.join(output.response for output in outputs)
            given = [token for output in outputs for token in output.token_ids]
            shown = end is not None and parameters['include_stop_str_in_output']
            assert given == ids + [end] * shown
            decoded = tokenizer.decode(ids, skip_special_tokens=parameters['skip_special_tokens'])
            assert text == decoded + '<|im_end|>' * shown
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason == ('length' if end is None else 'stop')
            assert outputs[-1].generate_token_len == len(given)
            cut += decoded.endswith('�')
    assert cut > ANSWERS / 10, 'few answers end within a character: the test shows little'


def test_closing_an_answer_cancels_it(tokenizer):
    cancelled = []

    class Watched(Handle):
        async def async_cancel(self, session_id):
            cancelled.append(session_id)

    async def leave():
        engine = Engine(tokenizer, Handles([Watched([1] * 100, 0, None, [1])]))
        session = engine.session_mgr.get()
        outputs = engine.generate(PreprocessedRequest(session, {'input_ids': [1]}, 1, GenerationConfig(), None))
        await anext(outputs)
        await outputs.aclose()
        assert cancelled == [session.session_id]
        assert not engine.session_mgr.sessions

    asyncio.run(leave())


def test_no_character_is_replaced_within_an_answer(tokenizer, transformers_tokenizer):
    text = ''.join(TEXTS)
    ids = transformers_tokenizer.encode(text, add_special_tokens=False)
    detokenize, state = Detokenizer(transformers_tokenizer), DetokenizeState(0)
    pieces = []
    for end in range(1, len(ids) + 1):
        piece, state = detokenize(ids[:end], state)
        pieces.append(piece)
    assert not re.search('�', ''.join(pieces))
    assert ''.join(pieces) == tokenizer.decode(ids)
