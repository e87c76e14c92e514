"""Writes documents as training data: InternVL's JSONL, with the pictures beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lmdeploy_vico.reader.documents.codes import Split
from lmdeploy_vico.reader.documents.export import FIRST_TRAINING_SEED
from lmdeploy_vico.reader.documents.page import make_page

FOLDER = 'pictures'
QUALITY = 95  # of JPEG, without subsampling: noise makes PNG five times as large


def write_samples(path: Path, seed: int, count: int, kinds: Mapping[str, float], tiles: Sequence[int]) -> None:
    """Write pictures and everything that can be asked about each, as one conversation.

    Args:
        path: the ``.jsonl`` file; pictures go into a folder beside it.
        seed: of what is drawn, from :data:`FIRST_TRAINING_SEED`.
        count: of pictures.
        kinds: of tiles, and how often each is drawn.
        tiles: how many tiles the pictures have, in turn.

    Raises:
        ValueError: a seed that is not for training.
        OSError: a file cannot be written.
    """
    if seed < FIRST_TRAINING_SEED:
        raise ValueError(f'The seed has to be {FIRST_TRAINING_SEED} or more: lower ones are for questions.')
    rng = np.random.default_rng(seed)
    folder = path.parent / FOLDER / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'{path.name}.part')  # a file that is there is whole
    with draft.open('w', encoding='utf-8') as file:
        written = 0
        while written < count:
            drawn = rng.choice(list(kinds), tiles[written % len(tiles)], p=list(kinds.values()))
            page = make_page(rng, [str(kind) for kind in drawn], Split.TRAIN)
            if not page.questions:  # two shapes and nothing else: nothing has one answer
                continue
            picture = folder / f'{written:06}.jpg'
            Image.fromarray(page.pixels).save(picture, quality=QUALITY, subsampling=0)
            turns = []
            for number in rng.permutation(len(page.questions)):
                question = page.questions[number]
                turns += [{'from': 'human', 'value': question.text}, {'from': 'gpt', 'value': question.answer}]
            turns[0]['value'] = f'<image>\n{turns[0]["value"]}'
            record = {'image': str(picture.relative_to(path.parent)), 'conversations': turns}
            file.write(json.dumps(record) + '\n')
            written += 1
    draft.replace(path)
