"""What the tests of training are made of."""

import json
from pathlib import Path

import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training.data.records import Records
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.data.tokens import load_tokenizer
from lmdeploy_vico.training.model.build import choose, fill, outline, outline_router

CPU = torch.device('cpu')


def human(text):
    return {'from': 'human', 'value': text}


def gpt(text):
    return {'from': 'gpt', 'value': text}


SAMPLES = [
    {'image': 'cup.png', 'conversations': [human('<image>\nWhat is it?'), gpt('A cup of coffee.')]},
    {'image': 'wide.png', 'conversations': [human('Read <image> aloud.'), gpt('Region-based segmentation')]},
    {
        'image': ['cup.png', 'wide.png'],
        'conversations': [
            {'from': 'system', 'value': 'You are terse.'},
            human('<image> or <image>?'),
            gpt('The first.'),
            human('Sure?'),
            gpt('Yes.'),
        ],
    },
    {'conversations': [human('Who is there?'), gpt('Nobody.')]},
]
TILES = [1, 3, 4, 0]


def write_data(folder: Path, pictures, samples=SAMPLES) -> Path:
    pictures['coffee'].resize((300, 300)).save(folder / 'cup.png')
    pictures['page'].resize((600, 300)).save(folder / 'wide.png')
    return write_lines(folder / 'train.jsonl', samples)


def write_lines(path: Path, samples) -> Path:
    path.write_text(''.join(json.dumps(sample) + '\n' for sample in samples))
    return path


def samples_of(data: Path, path: Path, config: VicoConfig, max_tiles=128, max_length=32768) -> Samples:
    return Samples(Records(data), load_tokenizer(path), config, max_tiles, max_length)


class Made:
    """A checkpoint's model and a file's samples."""

    def __init__(self, path: Path, data: Path) -> None:
        self.path = path
        self.config = json.loads((path / 'config.json').read_text())
        self.samples = samples_of(data, path, VicoConfig.from_dict(self.config))

    def model(self, *parts: str, router_only: bool = False):
        """The model in float32, with these parts trained."""
        outlined = outline_router(self.config) if router_only else outline(self.config)
        model = fill(outlined.float(), [self.path], CPU)
        choose(model, parts)
        return model
