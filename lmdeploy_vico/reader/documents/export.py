"""Writes documents as a data set of `lmdeploy-vico eval`: VLMEvalKit's tab-separated form."""

import base64
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lmdeploy_vico.reader.documents.codes import Split
from lmdeploy_vico.reader.documents.page import KINDS, Page, make_page
from lmdeploy_vico.reader.documents.tile import Question

FIRST_TRAINING_SEED = 1000  # documents of lower seeds are never trained on
PICKED = 1  # beside the seed: draws which questions are asked
MOST_BLANK = 200  # pictures in a row without any question that has one answer
COLUMNS = ('index', 'image', 'question', 'answer', 'category')


def pages(seed: int, kinds: Sequence[str], tiles: Sequence[int]) -> Iterator[Page]:
    """Return pictures without end, the same ones for the same arguments, with codes that are withheld from training.

    Args:
        seed: of what is drawn, below :data:`FIRST_TRAINING_SEED`.
        kinds: of tiles.
        tiles: how many tiles the pictures have, in turn.

    Raises:
        ValueError: a seed that is for training.
    """
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise ValueError(f'--seed: it has to be from 0 to {FIRST_TRAINING_SEED - 1}: others are for training.')
    rng = np.random.default_rng(seed)
    return (
        make_page(rng, [str(kind) for kind in rng.choice(kinds, count)], Split.TEST) for count in itertools.cycle(tiles)
    )


def write_questions(
    path: Path,
    seed: int,
    count: int,
    kinds: Sequence[str] = KINDS,
    tiles: Sequence[int] = (1, 3, 5),
    separate: bool = False,
    per_kind: int | None = None,
) -> int:
    """Write ``count`` questions; what one shows stands in the first of its rows, the others name that row.

    Args:
        path: the file.
        seed, kinds, tiles: as of :func:`pages`.
        count: of questions.
        separate: whether the tiles of a picture are shown as pictures of their own.
        per_kind: how many questions are asked at most about one picture's tiles of a kind; all of them without it.

    Returns:
        How many different pictures, or groups of them, are shown.

    Raises:
        ValueError: a seed that is for training, or pictures about which nothing can be asked.
        OSError: the file cannot be written.
    """
    written = pictures = blank = 0
    source, rng = pages(seed, kinds, tiles), np.random.default_rng([seed, PICKED])
    draft = path.with_name(f'{path.name}.part')  # a file that is there is whole
    try:
        with draft.open('w', newline='', encoding='utf-8') as file:
            rows = csv.writer(file, delimiter='\t', lineterminator='\n')
            rows.writerow(COLUMNS)
            while written < count:
                page = next(source)
                blank = 0 if page.questions else blank + 1
                if blank == MOST_BLANK:
                    raise ValueError('pictures of these kinds and numbers of tiles have no question with one answer.')
                asked = pick(rng, page.questions, per_kind)[: count - written]
                for number, question in enumerate(asked):
                    image = shown(page, separate) if number == 0 else str(written)
                    rows.writerow([written + number, image, question.text, question.answer, question.kind])
                written += len(asked)
                pictures += bool(asked)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return pictures


def pick(rng: np.random.Generator, questions: Sequence[Question], per_kind: int | None) -> list[Question]:
    """At most ``per_kind`` questions of each kind, in their order."""
    if per_kind is None:
        return list(questions)
    ordered = [questions[number] for number in rng.permutation(len(questions))]
    kinds = {question.kind for question in questions}
    chosen = [id(each) for kind in kinds for each in [one for one in ordered if one.kind == kind][:per_kind]]
    return [question for question in questions if id(question) in chosen]


def shown(page: Page, separate: bool) -> str:
    """The picture in base64; with ``separate``, its tiles, as a list that Python writes."""
    if not separate:
        return png(page.pixels)
    return str([png(page.part(number)) for number in range(len(page.tiles))])


def png(pixels: NDArray[np.uint8]) -> str:
    """Pixels as PNG, in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()
