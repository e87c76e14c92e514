"""``lmdeploy.pipeline``: the engine in this process, with chunked prefill, prefix caching and LoRA adapters."""

import json
import random
import shutil

import pytest
import torch
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from parity.judge import TOKENS, Answer, Judge
from parity.videos import moving_crops, read_video, write_video
from PIL import Image
from safetensors.torch import load_file, save_file
from serving.configurations import KINDS
from waiting import HANG

from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE

GREEDY = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
SHORT = ('a scanned page', 'two images with text between', 'text only')
RANK, ALPHA = 4, 8

pytestmark = pytest.mark.server


def ask(pipe, conversations, **options):
    answers = pipe(conversations, gen_config=GREEDY, **options)
    return [Answer(tuple(answer.token_ids), answer.input_token_len) for answer in answers]


@pytest.fixture(
    scope='module',
    # Servers of all kinds are asked the same (test_server.py).
    params=[pytest.param(kind, id=name, marks=pytest.mark.long if kind else ()) for name, kind in KINDS.items()],
)
def kind(request):
    return request.param


def test_alone_and_in_random_batches(kind, make_checkpoint, prompts, judge):
    config = PytorchEngineConfig(
        **TINY_ENGINE, session_len=16384, max_prefill_token_num=512, enable_prefix_caching=True
    )
    with pipeline(str(make_checkpoint(**kind)), backend_config=config) as pipe:
        for name, messages in prompts.items():
            [answer] = ask(pipe, [messages])
            judge(**kind).check(messages, answer, name=name)
        order = random.Random(3)
        for size in (5, 16):
            names = order.choices(list(prompts), k=size)
            for name, answer in zip(names, ask(pipe, [prompts[name] for name in names]), strict=True):
                judge(**kind).check(prompts[name], answer, name=name)


def test_closing_stops_the_vision_side(make_checkpoint):
    with pipeline(str(make_checkpoint()), backend_config=PytorchEngineConfig(**TINY_ENGINE, session_len=8192)) as pipe:
        model = pipe.async_engine.vl_encoder.model
        [worker] = model.stage._workers
    worker._thread.join(timeout=HANG)
    assert not worker._thread.is_alive() and not hasattr(model, 'stage')


def test_overrides_reach_the_router_and_the_servers_limit_on_tiles_holds_without_being_asked(
    make_checkpoint, prompts, judge
):
    # No score is above 1: nothing is compressed.
    overrides = {'flash_absolute_threshold': 1.0, 'vico': {'max_tiles': 2}}
    config = PytorchEngineConfig(**TINY_ENGINE, session_len=8192, hf_overrides=overrides)
    with pipeline(str(make_checkpoint()), backend_config=config) as pipe:
        [limited] = ask(pipe, [prompts['image alone']])
        [asked] = ask(pipe, [prompts['few tiles']])  # the same limit, asked for
    judge().check(prompts['few tiles'], asked, 'none', name='few tiles')
    assert limited.prompt_tokens < 4 * 256


@pytest.fixture(scope='module')
def pipe(make_checkpoint):
    """A pipeline with LMDeploy's defaults."""
    with pipeline(str(make_checkpoint()), backend_config=PytorchEngineConfig(**TINY_ENGINE, session_len=8192)) as pipe:
        yield pipe


def test_pairs_of_a_prompt_and_images(pipe, pictures, judge):
    images = [pictures['page'], pictures['astronaut']]
    [answer] = ask(pipe, [('Compare', images)])
    content = [
        {'type': 'text', 'text': 'Compare'},
        *({'type': 'image_url', 'image_url': {'url': image}} for image in images),
    ]
    judge().check([{'role': 'user', 'content': content}], answer)


def test_a_video_file_and_one_lazy_picture_many_times(pipe, pictures, judge, tmp_path):
    pictures['page'].save(tmp_path / 'page.png')
    video = write_video(tmp_path / 'coffee.mp4', moving_crops(pictures['coffee'], 20))
    question = {'type': 'text', 'text': 'Which came first?'}
    with Image.open(tmp_path / 'page.png') as lazy:
        images = [{'type': 'image', 'image': lazy, 'max_dynamic_patch': 1}] * 20
        file = {'type': 'video', 'video': str(video), 'num_frames': 4}
        [answer] = ask(pipe, [[{'role': 'user', 'content': [*images, file, question]}]])
    images = [{'type': 'image', 'image': pictures['page'], 'max_dynamic_patch': 1}] * 20
    frames = {'type': 'video_url', 'video_url': {'frames': read_video(video, 4)}}
    judge().check([{'role': 'user', 'content': [*images, frames, question]}], answer)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_targets(checkpoint):
    """Name and weight of every language model tensor that the adapters below change."""
    for shard in sorted(checkpoint.glob('*.safetensors')):
        for name, weight in load_file(shard).items():
            if name.endswith(('q_proj.weight', 'v_proj.weight', 'down_proj.weight')):
                yield name, weight


def write_adapter(path, checkpoint, prefix):
    """A PEFT adapter whose keys start with ``prefix``; returns the change of each weight."""
    generator = torch.Generator().manual_seed(5)
    tensors, changes = {}, {}
    for name, weight in lora_targets(checkpoint):
        low = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
        high = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
        key = prefix + name.removeprefix('language_model.').removesuffix('.weight')
        tensors[f'{key}.lora_A.weight'], tensors[f'{key}.lora_B.weight'] = low, high
        changes[name] = high @ low * (ALPHA / RANK)
    path.mkdir()
    save_file(tensors, path / 'adapter_model.safetensors')
    config = {'peft_type': 'LORA', 'r': RANK, 'lora_alpha': ALPHA, 'target_modules': ['q_proj', 'v_proj', 'down_proj']}
    (path / 'adapter_config.json').write_text(json.dumps(config))
    return changes


def merged(checkpoint, changes, path):
    """The checkpoint with the adapter added to its weights, in float32."""
    shutil.copytree(checkpoint, path)
    for shard in path.glob('*.safetensors'):
        tensors = {name: weight.float() + changes.get(name, 0) for name, weight in load_file(shard).items()}
        save_file(tensors, shard)
    return path


def test_lora_adapters(make_checkpoint, prompts, judge, tmp_path):
    checkpoint = make_checkpoint()
    changes = write_adapter(tmp_path / 'whole', checkpoint, 'base_model.model.language_model.')
    write_adapter(tmp_path / 'language', checkpoint, 'base_model.model.')
    adapted = Judge(merged(checkpoint, changes, tmp_path / 'merged'))
    adapters = {'whole': str(tmp_path / 'whole'), 'language': str(tmp_path / 'language')}
    with pipeline(
        str(checkpoint), backend_config=PytorchEngineConfig(**TINY_ENGINE, session_len=8192, adapters=adapters)
    ) as pipe:
        for name in SHORT:
            [base] = ask(pipe, [prompts[name]])
            judge().check(prompts[name], base, name=name)
            for adapter in adapters:
                [answer] = ask(pipe, [prompts[name]], adapter_name=adapter)
                adapted.check(prompts[name], answer, name=name)
                assert answer.token_ids != base.token_ids
