"""Checks of the reference itself: against LMDeploy where LMDeploy is right, and that its answers can fail a test."""

import itertools
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity.prompts import Picture, chat_segments
from parity.reference import Reference, choose_grid, cut_tiles, route, shuffle
from PIL import Image, ImageFilter

SHIPPED = ('astronaut.png', 'coffee.png', 'chelsea.png', 'page.png', 'rocket.jpg', 'text.png')
QUESTION = 'Describe this image in detail.'


@pytest.fixture(scope='module')
def reference(make_checkpoint) -> Reference:
    return Reference(make_checkpoint())


def ask(image: Image.Image, question: str = QUESTION) -> list:
    item = {'type': 'image_url', 'image_url': {'url': image}}
    return chat_segments([{'role': 'user', 'content': [item, {'type': 'text', 'text': question}]}])


def distance(reference: Reference, a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of the next token's logits after two prompts, in standard deviations."""
    x, y = (reference.logits(embeddings, 1)[0] for embeddings in (a, b))
    return float((x - y).square().mean().sqrt() / x.std())


# --- tiling ----------------------------------------------------------------------------------------------------------


def lmdeploy_tiles(image: Image.Image, max_tiles: int) -> np.ndarray:
    from lmdeploy.vl.model.internvl import dynamic_preprocess

    return np.stack([np.asarray(t.convert('RGB')) for t in dynamic_preprocess(image, 1, max_tiles, 448, True)])


@pytest.mark.parametrize('mode', ['RGB', 'P', 'RGBA', 'L', '1', 'CMYK', 'LA', 'I;16'])
def test_tiles_are_lmdeploys_in_every_mode(pictures, mode):
    if mode == 'I;16':
        image = Image.fromarray(np.arange(300 * 200, dtype=np.uint16).reshape(300, 200))
    else:
        image = pictures['chelsea'].resize((300, 170)).convert(mode)
    assert image.mode == mode
    assert np.array_equal(cut_tiles(image, 1, 4, True), lmdeploy_tiles(image, 4))


@pytest.mark.parametrize('size', [(1, 1), (7, 2000), (2000, 7), (448, 448), (449, 448), (1344, 1344), (500, 333)])
@pytest.mark.parametrize('max_tiles', [1, 6, 12])
def test_tiles_are_lmdeploys_at_extreme_sizes(rng, size, max_tiles):
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert np.array_equal(cut_tiles(image, 1, max_tiles, True), lmdeploy_tiles(image, max_tiles))


@pytest.mark.parametrize('max_tiles', [1, 2, 6, 12, 24])
def test_grid_is_lmdeploys_at_every_tie(max_tiles):
    from lmdeploy.vl.model.internvl import find_closest_aspect_ratio

    # Written as LMDeploy writes it, since the order of a set decides between grids of one area.
    numbers = range(1, max_tiles + 1)
    grids = {(i, j) for n in numbers for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= max_tiles}
    grids = sorted(grids, key=lambda g: g[0] * g[1])
    ratios = sorted({Fraction(*g) for g in grids})
    ratios += [(a + b) / 2 for a, b in itertools.pairwise(ratios)]
    for ratio in ratios:
        for scale in (1, 7, 40, 300):
            width, height = ratio.numerator * scale, ratio.denominator * scale
            theirs = find_closest_aspect_ratio(width / height, grids, width, height, 448)
            assert choose_grid(width, height, 1, max_tiles) == theirs, (width, height)


# --- vision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [2, 4])
def test_shuffle_is_row_major(ratio):
    width, side = 3, 32 // ratio
    x = torch.randn(1024, width)
    y = shuffle(x, ratio)
    i, j, dy, dx, c = side - 1, 1, ratio - 1, 1, 2
    assert y.shape == (side * side, ratio * ratio * width)
    assert y[i * side + j, (dy * ratio + dx) * width + c] == x[(ratio * i + dy) * 32 + ratio * j + dx, c]


def test_routes():
    scores = [0.9, 0.6, 0.6, 0.2]
    assert route(scores, 'auto', 0.5, 0.5) == [True, False, False, False]
    assert route(scores, 'auto', 0.0, 0.5) == [True, True, True, False]
    assert route([0.9], 'auto', 0.5, 0.5) == [False]
    assert route(scores, 'all', 0.5, 0.5) == [True] * 4
    assert route(scores, 'none', 0.5, 0.5) == [False] * 4
    assert route(scores, 0.5, 0.5, 0.5) == [True, True, False, False]
    assert route(scores, 0.125, 0.5, 0.5) == [True, False, False, False]  # 0.5 of a tile rounds up
    assert route(scores, 0.12, 0.5, 0.5) == [False] * 4


def test_pictures_are_in_the_wheel():
    import skimage

    folder = Path(skimage.__file__).parent / 'data'
    assert [name for name in SHIPPED if not (folder / name).is_file()] == []


@pytest.mark.parametrize(('llm', 'vit'), [('dense', 'layer_norm'), ('moe', 'rms_norm')])
def test_photographs_have_tiles_of_both_kinds_and_no_near_ties(make_checkpoint, pictures, llm, vit):
    model = Reference(make_checkpoint(llm=llm, vit=vit))
    mixed = []
    for image in (pictures[name] for name in ('coffee', 'chelsea', 'rocket', 'text', 'page')):
        encoded = model.encode([image])[0]
        mixed.append(set(encoded.tile_tokens) == {64, 256})
        ranked = sorted(encoded.scores)
        middle = (len(ranked) - 1) // 2
        assert ranked[middle + 1] - ranked[middle] > 1e-4, encoded.scores
        assert min(abs(s - 0.5) for s in ranked) > 1e-4
    assert sum(mixed) >= 4


def test_smooth_tiles_score_higher(reference, pictures):
    def score(image: Image.Image) -> float:
        return reference.scores(reference.features(cut_tiles(image, 1, 1, False)))[0]

    for name, picture in pictures.items():
        tile = picture.resize((448, 448))
        assert score(tile.filter(ImageFilter.GaussianBlur(4))) > score(tile) + 0.005, name
    ramp = np.broadcast_to(np.linspace(60, 190, 448).astype(np.uint8)[:, None, None], (448, 448, 3))
    assert score(Image.fromarray(np.ascontiguousarray(ramp))) > 0.5
    assert score(Image.new('RGB', (448, 448), (90, 140, 200))) > 0.5
    assert score(pictures['page']) < 0.5


def test_images_with_their_own_compression_are_routed_alone(reference, pictures):
    coffee, page = pictures['coffee'], pictures['page']
    alone = reference.encode([coffee])[0]
    both = reference.encode([coffee, page], per_image=[None, 'all'])
    assert torch.equal(both[0].embeddings, alone.embeddings)
    assert set(both[1].tile_tokens) == {64}
    together = reference.encode([coffee, page])
    flat = route(together[0].scores + together[1].scores, 'auto', 0.5, 0.5)
    assert [t == 64 for e in together for t in e.tile_tokens] == flat


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'messages',
    [
        [{'role': 'user', 'content': 'Hello'}],
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hello'}],
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'one'}, {'type': 'text', 'text': 'two'}]}],
        [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}],
        [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'The answer'}],
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}, 'image', {'type': 'text', 'text': 'y'}]}],
        [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': ['image', 'image']}],
        [
            {'role': 'user', 'content': ['image']},
            {'role': 'assistant', 'content': 'b'},
            {'role': 'user', 'content': 'c'},
        ],
    ],
)
def test_chat_segments_are_lmdeploys_prompt(make_checkpoint, messages):
    from lmdeploy.model import HFChatTemplate
    from lmdeploy.serve.processors.multimodal import MultimodalProcessor
    from lmdeploy.vl.model.internvl import InternVLVisionModel

    image = {'type': 'image', 'image': Image.new('RGB', (8, 8))}
    messages = [
        {**m, 'content': [image if x == 'image' else x for x in m['content']]} if isinstance(m['content'], list) else m
        for m in messages
    ]
    template = HFChatTemplate(str(make_checkpoint()))
    if any(image in m['content'] for m in messages if isinstance(m['content'], list)):
        model = SimpleNamespace(image_token='<IMG_CONTEXT>')
        theirs, _ = InternVLVisionModel.proc_messages(model, messages, template)
    else:
        theirs = template.messages2prompt([MultimodalProcessor.merge_message_content(m) for m in messages])
    ours = [s if isinstance(s, str) else '<img><IMG_CONTEXT></img>' for s in chat_segments(messages)]
    assert ''.join(ours) == theirs


def test_image_options_reach_the_picture():
    image = Image.new('RGB', (8, 8))
    value = {'url': image, 'detail': 'low', 'compression': 0.5}
    segments = chat_segments([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': value}]}])
    assert segments[1] == Picture(image, 0.5, 6)
    value['max_dynamic_patch'] = 3
    segments = chat_segments([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': value}]}])
    assert segments[1].max_tiles == 3


def test_a_typed_image_token_is_a_word(reference, pictures):
    ids, embeddings = reference.prompt(['<IMG_CONTEXT> and ', Picture(pictures['page'], 'all')])
    words = reference.language.get_input_embeddings().weight
    places = [i for i, token in enumerate(ids) if token == reference.image_token]
    assert len(places) == 1 + 64 * len(reference.tile(pictures['page']))
    assert torch.equal(embeddings[places[0]], words[reference.image_token])
    assert not torch.equal(embeddings[places[1]], words[reference.image_token])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_judging_ones_own_answer(reference, pictures):
    segments = ask(pictures['page'])
    output = reference.generate(segments, 12)
    judgement = reference.judge(segments, output)
    assert judgement.best == output
    assert judgement.gap == 0
    assert judgement.prompt_tokens == len(reference.prompt_ids(segments))
    assert len(set(output)) > 4
    assert np.mean(np.array(judgement.margins) > 0.05) > 0.6
    wrong = [*output[:5], (output[5] + 1) % 800, *output[6:]]
    assert reference.judge(segments, wrong).gap > 0.5


def test_answers_depend_on_the_picture_and_the_question(reference, pictures):
    answers = {tuple(reference.generate(ask(pictures[name]), 6)) for name in ('page', 'astronaut', 'coffee', 'rocket')}
    answers.add(tuple(reference.generate(ask(pictures['page'], 'Read the text.'), 6)))
    assert len(answers) == 5


@pytest.mark.parametrize(('llm', 'vit'), [('dense', 'layer_norm'), ('moe', 'rms_norm')])
def test_logits_depend_on_order_and_compression_of_tiles(make_checkpoint, pictures, llm, vit):
    model = Reference(make_checkpoint(llm=llm, vit=vit))
    segments = ask(pictures['coffee'])
    ids, full = model.prompt(segments, 'none')
    start = ids.index(model.image_token)
    for a, b in ((0, 1), (1, 2), (2, 5)):
        swapped = full.clone()
        first, second = (slice(start + 256 * t, start + 256 * (t + 1)) for t in (a, b))
        swapped[first], swapped[second] = full[second], full[first]
        assert distance(model, full, swapped) > 0.05, (a, b)
    assert distance(model, full, model.prompt(segments, 'auto')[1]) > 0.3
    assert distance(model, full, model.prompt(segments, 'all')[1]) > 0.3


def test_plain_checkpoints_have_256_tokens_a_tile(make_checkpoint, pictures):
    model = Reference(make_checkpoint(flash=False))
    assert set(model.encode([pictures['page']])[0].tile_tokens) == {256}
    assert len(set(model.generate(ask(pictures['page']), 4))) > 1
