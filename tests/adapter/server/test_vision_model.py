"""A request from LMDeploy's first call to the prompt: every decision about it is taken once."""

import asyncio
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy.model import BaseChatTemplate
from lmdeploy.serve.processors.multimodal import MultimodalProcessor
from lmdeploy.vl.engine import ImageEncoder
from parity.conversations import data_url, video_url
from parity.videos import moving_crops, write_video
from PIL import Image

from lmdeploy_vico.adapter.server import items, request, served, vision_model
from lmdeploy_vico.adapter.server.forms.ids import mark_ids, stand_for_ids
from lmdeploy_vico.adapter.server.forms.texts import TextBound
from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.placement.language import PytorchLanguage
from lmdeploy_vico.adapter.server.served import ServedRequest, leave_alone, serving
from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput
from lmdeploy_vico.adapter.server.turbomind.language import TurbomindLanguage
from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel
from lmdeploy_vico.choices import Pressed
from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.fetch import Fetcher
from lmdeploy_vico.media.loader import Files, MediaLoader
from lmdeploy_vico.media.memory import MemoryBudget
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.stage.queue import TileQueue
from lmdeploy_vico.vision import tiling
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.tiling import Grid, Tiling

IMAGE_TOKEN, VOCABULARY, BLOCK, WIDTH = 9, 1000, 64, 8


class Stage:
    """Stands in for a VisionStage: makes visual tokens up, 256 of each tile."""

    def __init__(self):
        self.queue = TileQueue(100)
        self.submitted = []

    def admit(self, size):
        return self.queue.admit(size)

    def release(self, admission):
        self.queue.release(admission)

    def submit(self, jobs, compression, admission):
        assert admission in self.queue._admissions
        self.submitted.append((jobs, compression))
        future = Future()
        future.set_result([self.encoded(number, job.grid.tiles) for number, job in enumerate(jobs)])
        return future

    def encoded(self, number, tiles):
        tokens = VisualTokens(torch.full((256 * tiles, WIDTH), float(number)), [256] * tiles, [0.0] * tiles)
        return EncodedImage(tokens, [bytes([number, tile]) for tile in range(tiles)])


class Template(BaseChatTemplate):
    def messages2prompt(self, messages, **kwargs):
        return ''.join(f'[{message["role"]}]{message["content"]}' for message in messages)


@pytest.fixture
def model():
    """A VisionModel as it is after its start, on a stage that makes visual tokens up."""
    model = VicoVisionModel.__new__(VicoVisionModel)
    model.tokenizer = SimpleNamespace(encode=lambda text, add_bos: [1] * add_bos + [2] * len(text))
    model.image_token_id = IMAGE_TOKEN
    model.hf_config = SimpleNamespace(llm_config=SimpleNamespace(vocab_size=VOCABULARY))
    model.backend_config = SimpleNamespace(session_len=10**5)
    model.language = PytorchLanguage(model.hf_config, PytorchEngineConfig(block_size=BLOCK))
    model.stage, model.rules = Stage(), Rules(Tiling(1, 12), max_tiles=40)
    model.thresholds = (0.5, 0.5)
    model._memory, model._synthetic, model._assembling = MemoryBudget(None), None, None
    decoder = MediaDecoder(2)
    model._texts = TextBound({'x' * 8: 0})
    model.loader = MediaLoader(decoder, Fetcher(10**6, 10), Files(), 10**6, PictureOptions())
    yield model
    decoder.close()


@pytest.fixture
def processor(model):
    """LMDeploy's, which asks the model for every request."""
    encoder = ImageEncoder.__new__(ImageEncoder)
    encoder.model, encoder._uses_new_preprocess, encoder.preprocess = model, True, model.preprocess_async
    return MultimodalProcessor(model.tokenizer, Template(), vl_encoder=encoder, backend='pytorch')


@pytest.fixture
def calls(monkeypatch):
    """Which functions have been called, and with what."""
    made = []

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*args, **kwargs):
            made.append((name, args))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(tiling, 'choose_grid')
    record(items, 'parse_compression')
    record(request, 'parse_compression')
    record(request, 'parse_item')
    record(items, '_tile_limit')
    record(items, '_video_options')
    record(TileQueue, 'admit')
    record(served, 'MemoryShare')
    return made


@pytest.fixture(scope='module')
def video(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'coffee.mp4'
    return video_url(write_video(path, moving_crops(pictures['coffee'], 6)))


def text(value):
    return {'type': 'text', 'text': value}


def image(size, **params):
    return {'type': 'image_url', 'image_url': {'url': data_url(Image.new('RGB', size)), **params}}


def test_every_decision_is_taken_once(model, processor, calls, video):
    film = {'type': 'video_url', 'video_url': {'url': video, 'num_frames': 3, 'compression': 'none'}}
    content = [image((896, 448), compression='all'), text('a'), film, image((448, 896), max_dynamic_patch=2), text('b')]
    client = ServedRequest()

    async def ask():
        with serving(client):
            return await processor.get_prompt_input(
                [{'role': 'user', 'content': content}],
                do_preprocess=True,
                media_io_kwargs={'video': {'fps': 30}},
                mm_processor_kwargs={'image': {'compression': 0.5}},
            )

    prompt = asyncio.run(ask())
    model.stage.queue.admit(100)  # the place has been given back

    def of(name):
        return [args for called, args in calls if called == name]

    assert sorted(args[:4] for args in of('choose_grid')) == [(448, 896, 1, 2), (896, 448, 1, 12)]
    assert of('parse_compression') == [
        (0.5, 'mm_processor_kwargs["image"]["compression"]'),
        ('all', 'image_url["compression"]'),
        ('none', 'video_url["compression"]'),
    ]
    assert [args[0] for args in of('parse_item')] == content
    assert len(of('_tile_limit')) == 2
    assert of('_video_options') == [({'fps': 30},)]
    assert [size for _, size in of('admit')[:-1]] == [13 + 3 + 3]
    assert len(of('MemoryShare')) == 1

    [(jobs, compression)] = model.stage.submitted
    assert compression == 0.5
    own = [(job.grid.tiles, job.compression, job.routed_with) for job in jobs]
    assert own == [(3, 'all', None), *[(1, 'none', 1)] * 3, (3, None, None)]
    assert jobs[0].grid == Grid(2, 1, True) and jobs[4].grid == Grid(1, 2, True)

    frames = ''.join(f'Frame{number}: <img><IMG_CONTEXT></img>\n' for number in (1, 2, 3))
    one = '<img><IMG_CONTEXT></img>\n'
    assert prompt['prompt'] == f'[user]{one}a{frames}{one}b'
    visual = 256 * (3 + 3 + 3)
    assert prompt['input_ids'].count(IMAGE_TOKEN) == sum(map(len, prompt['multimodal'])) == visual
    assert sum(client.tile_tokens) == visual and client.admission is None and not client.pending


def test_pressure_is_decided_once_and_counted_beside_the_loop(model, processor, monkeypatch):
    shares, threads = [0.5, 0.25], []
    model.valve = SimpleNamespace(decide=lambda: shares.pop(0))
    monkeypatch.setattr(vision_model, 'pressed_tiles', lambda *_: threads.append(threading.current_thread()) or 7)
    client = ServedRequest()

    async def ask():
        with serving(client):
            messages = [{'role': 'user', 'content': [image((448, 448))]}]
            return await asyncio.gather(*(processor.get_prompt_input(messages, do_preprocess=True) for _ in range(2)))

    asyncio.run(ask())
    assert [compression for _, compression in model.stage.submitted] == [Pressed('auto', 0.5)] * 2
    assert shares == [0.25] and client.pressed_tiles == 7
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_a_request_that_is_left_alone_asks_for_no_pressure(model):
    model.valve = SimpleNamespace(decide=lambda: pytest.fail('asked'))
    with serving(ServedRequest()):
        leave_alone()
        assert model.parse([{'role': 'user', 'content': [image((448, 448))]}], None, None).compression == 'auto'


def test_choices_share_their_place_and_decide_each_for_itself(model, processor, calls):
    async def ask():
        with serving(ServedRequest()):
            messages = [{'role': 'user', 'content': [image((448, 448))]}]
            return await asyncio.gather(*(processor.get_prompt_input(messages, do_preprocess=True) for _ in range(3)))

    first, *others = asyncio.run(ask())
    assert all(other['input_ids'] == first['input_ids'] for other in others)
    assert [name for name, _ in calls].count('admit') == [name for name, _ in calls].count('MemoryShare') == 1
    assert [name for name, _ in calls].count('choose_grid') == 3
    assert len(model.stage.submitted) == 3


def test_pictures_of_a_pipeline_without_a_client(model, processor):
    """As ``lmdeploy.pipeline`` passes them on, outside of any HTTP request."""
    picture = Image.new('RGB', (448, 448))
    [pair] = processor.format_prompts(('look', picture))
    prompt = asyncio.run(processor.get_prompt_input(pair, do_preprocess=True))
    [([job], compression)] = model.stage.submitted
    assert job.image is picture and compression == 'auto'
    assert prompt['input_ids'].count(IMAGE_TOKEN) == 256


def test_ids_of_generate(model, processor):
    content = [text([5, IMAGE_TOKEN, 6]), image((448, 448))]
    ask = processor.get_prompt_input([{'role': 'user', 'content': content}], do_preprocess=False)
    prompt = asyncio.run(ask)
    assert prompt['prompt'] is None
    assert prompt['input_ids'] == [5, *[IMAGE_TOKEN] * 256, 6]


def test_blocking_form(model, processor):
    async def decoded():
        messages = [{'role': 'user', 'content': [image((448, 448))]}]
        asked = model.parse(messages, None, None)
        async with model.admit(asked):
            ready = await processor.async_parse_multimodal_item(asked)
            return model.preprocess(ready, input_prompt=model.get_input_prompt(ready, Template()))

    assert asyncio.run(decoded())['input_ids'].count(IMAGE_TOKEN) == 256


# --- whatever has no images ------------------------------------------------------------------------------------------


def asked(processor, prompt, **options):
    return asyncio.run(processor.get_prompt_input(prompt, **{'do_preprocess': True, **options}))


def user(*content):
    return [{'role': 'user', 'content': list(content)}]


def test_messages_without_images_are_parsed_too(model, processor):
    history = [*user(text('a'), text('b')), {'role': 'assistant', 'content': [{'type': 'refusal', 'refusal': 'No.'}]}]
    assert asked(processor, history)['prompt'] == '[user]a\nb[assistant]No.'
    assert asked(processor, [*history, *user(image((448, 448)))])['prompt'].startswith('[user]ab[assistant]No.[user]')
    for prompt in (user({'type': 'image_pil', 'image_pil': 'x'}), [{'role': 'user'}], ['x'], user(text([5]))):
        with pytest.raises(ValueError, match=r'are not supported|must (be|have)'):
            asked(processor, prompt)


@pytest.mark.parametrize('prompt', ['a text', user(text('a'))])
def test_options_without_images_are_checked(processor, prompt):
    def check(**options):
        return asked(processor, prompt, do_preprocess=False, **options)

    assert check(mm_processor_kwargs={}, media_io_kwargs={})['input_ids']
    with pytest.raises(ValueError, match='mm_processor_kwargs has the keys'):
        check(mm_processor_kwargs={'images': {}})
    with pytest.raises(ValueError, match='media_io_kwargs has the keys'):
        check(media_io_kwargs={'images': {}})


@pytest.mark.parametrize('items', [[], [image((8, 8))]], ids=['text', 'image'])
def test_what_a_template_cannot_render(processor, monkeypatch, items):
    def messages2prompt(messages, **kwargs):
        raise TypeError('HFChatTemplate.messages2prompt() got multiple values for argument')

    monkeypatch.setattr(processor.chat_template, 'messages2prompt', messages2prompt)
    with pytest.raises(ValueError, match='The messages cannot be rendered and tokenized'):
        asked(processor, user(text('a'), *items))


@pytest.mark.parametrize('prompt', ['half \ud800', 5, {'role': 'user', 'content': 'x'}])
def test_prompts_that_are_none(processor, prompt):
    with pytest.raises(ValueError, match='A prompt must be a text or a list of messages|half of a surrogate pair'):
        asked(processor, prompt)


def test_ids_without_images(processor):
    """/generate with ``image_data: []``."""
    assert asked(processor, user(text([5, 6])), do_preprocess=False) == {'prompt': None, 'input_ids': [5, 6]}
    with pytest.raises(ValueError, match='input_ids must be integers from 0 to 999, not 1000'):
        asked(processor, user(text([1000])), do_preprocess=False)


def test_ids_of_a_chat_request(processor):
    """Where LMDeploy has put them, as opposed to a list that a client wrote for a text."""
    request = SimpleNamespace(input_ids=[5, IMAGE_TOKEN, 6])
    mark_ids(request)
    made = asked(processor, user(text(request.input_ids), image((448, 448))))
    assert made['input_ids'] == [5, *[IMAGE_TOKEN] * 256, 6]
    assert asked(processor, user(text(request.input_ids))) == {'prompt': None, 'input_ids': [5, IMAGE_TOKEN, 6]}
    with pytest.raises(ValueError, match='must have a string "text"'):
        asked(processor, user(text([5, IMAGE_TOKEN, 6]), image((448, 448))))


@pytest.mark.parametrize(
    'prompt', [None, 'x', [], [5], user(), [{'role': 'user', 'content': 'x'}], user(image((8, 8)))]
)
def test_what_does_not_stand_for_ids(prompt):
    assert not stand_for_ids(prompt)


def test_the_salt_of_the_request_reaches_the_stage(model, processor):
    async def ask(**noted):
        with serving(ServedRequest(**noted)):
            await processor.get_prompt_input(user(image((448, 448))), do_preprocess=True)

    asyncio.run(ask(cache_salt='mine'))
    asyncio.run(ask())
    assert [job.salt for jobs, _ in model.stage.submitted for job in jobs] == ['mine', '']


def test_turbomind_gets_one_matrix_that_is_made_beside_the_loop(model, processor, monkeypatch):
    threads, of = [], VisualInput.of
    recorded = staticmethod(lambda *given: threads.append(threading.current_thread()) or of(*given))
    monkeypatch.setattr(VisualInput, 'of', recorded)
    model.language = TurbomindLanguage.__new__(TurbomindLanguage)  # as it is when TurboMind has been built
    model.language.engine_dtype, model.language.width = torch.bfloat16, WIDTH
    model.language._beyond_float16 = ''
    processor.backend = 'turbomind'
    made = asked(processor, user(image((448, 448)), text('x'), image((896, 448))))
    [visual] = made['multimodal']
    placed = [index for index, token in enumerate(made['input_ids']) if token == IMAGE_TOKEN]
    assert [index for begin, end in visual.ranges.tolist() for index in range(begin, end)] == placed
    assert visual.values.shape == (4 * 256, WIDTH) and visual.values.dtype == torch.bfloat16
    assert visual.values[:256].eq(0).all() and visual.values[256:].eq(1).all()
    assert threading.main_thread() not in threads and len(threads) == 1
    assert 'multimodal' not in asked(processor, user(text('x')))
