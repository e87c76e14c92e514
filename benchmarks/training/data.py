"""Photographs with generated questions, whose answers are in the pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

PICTURES = ('astronaut', 'coffee', 'chelsea', 'rocket', 'page', 'text')
SIZE = (896, 896)  # four tiles and a thumbnail
LEARNT = 0.6  # of a picture's width, from the left; held-out samples are cut from the rest


def write(folder: Path, crops: int, seed: int) -> tuple[Path, Path]:
    """Write two files of samples, to train with and to judge by, with so many crops and questions of each picture."""
    rng = np.random.default_rng(seed)
    samples: dict[str, list[dict[str, Any]]] = {'train': [], 'held-out': []}
    for name in PICTURES:
        picture = Image.fromarray(getattr(data, name)()).convert('RGB')
        border = int(LEARNT * picture.width)
        for kind, (left, right) in {'train': (0, border), 'held-out': (border, picture.width)}.items():
            for number in range(crops if kind == 'train' else max(1, crops // 4)):
                crop = _crop(picture.crop((left, 0, right, picture.height)), rng)
                file = f'{name}-{kind}-{number}.png'
                crop.resize(SIZE).save(folder / file)
                samples[kind].append(_sample(file, np.asarray(crop, dtype=np.float64), rng))
    paths = folder / 'train.jsonl', folder / 'held-out.jsonl'
    for path, kind in zip(paths, samples, strict=True):
        path.write_text(''.join(json.dumps(sample) + '\n' for sample in samples[kind]), encoding='utf-8')
    return paths


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of at least half the size that fits."""
    side = int(min(picture.size) * rng.uniform(0.5, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def _sample(file: str, pixels: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    question, answer = _questions(pixels)[int(rng.integers(3))]
    turns = [{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': answer}]
    return {'image': file, 'conversations': turns}


def _questions(pixels: np.ndarray) -> list[tuple[str, str]]:
    grey = pixels.mean(-1)
    left, right = np.array_split(grey, 2, axis=1)
    brighter = 'left' if left.mean() > right.mean() else 'right'
    detailed = 'left' if _detail(left) > _detail(right) else 'right'
    colour = ('red', 'green', 'blue')[int(pixels.mean((0, 1)).argmax())]
    return [
        ('Which half of the picture is brighter?', f'The {brighter} half of the picture is brighter.'),
        ('Which half shows more detail?', f'The {detailed} half of the picture shows more detail.'),
        ('Which colour is the picture?', f'There is more {colour} than any other colour in the picture.'),
    ]


def _detail(grey: np.ndarray) -> float:
    return float(np.abs(np.diff(grey, axis=1)).mean())
