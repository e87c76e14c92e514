"""Tiles without text: coloured shapes, and photographs that come with scikit-image."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from lmdeploy_vico.reader.documents.tile import SIZE, Pixels, Question, Tile, blank

SHAPE_QUESTION, COLOUR_QUESTION, PHOTO_QUESTION = 'Which shape?', 'Which colour?', 'Which photograph?'
COLOURS = {
    'red': (210, 40, 40), 'green': (40, 160, 60), 'blue': (40, 70, 210), 'yellow': (235, 210, 40),
    'purple': (140, 50, 170), 'orange': (240, 140, 30),
}  # fmt: skip
SHAPES = ('circle', 'square', 'triangle', 'cross')
SIDE = (84, 200)  # pixels of a shape, from and to
SHADE = 20  # a colour differs by at most so much in each channel
# By the name that is the answer: the reader knows them by heart.
PHOTOGRAPHS = {
    'astronaut': 'astronaut', 'coffee': 'coffee', 'cat': 'chelsea', 'rocket': 'rocket', 'brick': 'brick',
    'grass': 'grass', 'gravel': 'gravel', 'moon': 'moon', 'coins': 'coins', 'eye': 'retina',
    'stars': 'hubble_deep_field',
}  # fmt: skip
LARGEST = 900  # pixels of a photograph's longer side
PART = 0.6  # of a photograph's shorter side are shown at least


def shape_tile(rng: np.random.Generator) -> Tile:
    """Draw one shape in one colour."""
    tile, _ = blank(rng)
    side = int(rng.integers(*SIDE))
    left, top = (int(start) for start in rng.integers(0, SIZE - side + 1, 2))
    colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))
    shade = np.array(list(COLOURS.values())[colour]) + rng.uniform(-SHADE, SHADE, 3)
    image = Image.fromarray(tile.pixels.clip(0, 255).astype(np.uint8))
    _draw(ImageDraw.Draw(image), SHAPES[shape], (left, top, side), tuple(int(one) for one in shade.clip(0, 255)))
    tile.pixels = np.asarray(image, np.float32)
    tile.questions = [
        Question(SHAPE_QUESTION, SHAPES[shape], 'shape'),
        Question(COLOUR_QUESTION, list(COLOURS)[colour], 'shape'),
    ]
    tile.mark_pixels(left, top, side, {'shape': 1 + shape, 'colour': 1 + colour})
    return tile


def _draw(draw: ImageDraw.ImageDraw, shape: str, square: tuple[int, int, int], fill: tuple[int, ...]) -> None:
    left, top, side = square
    right, bottom, third = left + side, top + side, side // 3
    if shape == 'circle':
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == 'square':
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == 'triangle':
        draw.polygon([(left, bottom), (right, bottom), (left + side // 2, top)], fill=fill)
    else:
        draw.rectangle((left + third, top, left + 2 * third, bottom), fill=fill)
        draw.rectangle((left, top + third, right, top + 2 * third), fill=fill)


@cache
def _photograph(name: str) -> Image.Image:
    from skimage import data

    image = Image.fromarray(getattr(data, PHOTOGRAPHS[name])()).convert('RGB')
    image.thumbnail((LARGEST, LARGEST))
    return image


def photo_tile(rng: np.random.Generator) -> Tile:
    """Show a part of a photograph, perhaps mirrored, lighter or darker."""
    number = int(rng.integers(len(PHOTOGRAPHS)))
    name = list(PHOTOGRAPHS)[number]
    image = _photograph(name)
    side = int(rng.integers(int(min(image.size) * PART), min(image.size) + 1))
    left, top = (int(rng.integers(0, whole - side + 1)) for whole in image.size)
    part = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels: Pixels = np.asarray(part, np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    tile = Tile(pixels * np.float32(rng.uniform(0.8, 1.2)), [Question(PHOTO_QUESTION, name, 'photo')])
    tile.labels['photo'][:] = 1 + number
    return tile
