"""Reads data sets in VLMEvalKit's form: one tab-separated file, one question a row, its pictures in base64.

Columns: ``index``, ``question``, ``answer``; pictures in ``image`` (base64, a list of them written as Python writes it,
or the index of another row that has the picture) or ``image_path``; choices in ``A``, ``B``, ... or, as a list, in
``candidates``; optionally ``hint`` and ``category``. A video is the file ``video_path`` or ``video``, its subtitles are
the text ``subtitles`` or the SubRip file ``subtitle_path``.
"""

import ast
import base64
import binascii
import csv
import hashlib
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lmdeploy_vico.evaluation import EvaluationError

REQUIRED = ('index', 'question', 'answer')
LONGEST_INDEX = 64  # characters of an image column that names another row; base64 of a picture has more
VIDEO_SUFFIXES = ('', '.mp4', '.webm', '.mkv', '.avi')
SUBRIP_TIMES = r'^\d+\s*\n.*-->.*\n'  # the number of a subtitle and when it is shown


@dataclass(frozen=True)
class Question:
    """One row of a data set.

    Attributes:
        index: names it in its data set.
        text: what is asked.
        answer: as the file has it; see :attr:`answers`.
        pictures: each in base64.
        choices: by their letters; empty unless one of several answers is to be chosen.
        category: None where the data set has none.
        hint: to be read before the question, or empty.
        video: the file of a video, or None.
        subtitles: of the video, or empty.
        group: names what the question is asked about: rows with the same picture have the same.
    """

    index: str
    text: str
    answer: str
    pictures: tuple[str, ...] = ()
    choices: Mapping[str, str] | None = None
    category: str | None = None
    hint: str = ''
    video: Path | None = None
    subtitles: str = ''
    group: str = ''

    @cached_property
    def answers(self) -> Sequence[str]:
        """All accepted answers: those of a list as Python writes it, or the one there is."""
        return _listed(self.answer)


@dataclass(frozen=True)
class DataSet:
    """The questions of one file.

    Attributes:
        name: that of the file, without its suffix.
        questions: in the file's order.
    """

    name: str
    questions: Sequence[Question]


def read(path: Path) -> DataSet:
    """Read a data set.

    Raises:
        EvaluationError: something is missing or malformed; the message names file and row.
    """
    rows = list(_rows(path))
    pictures = {row['index']: row.get('image', '') for _, row in rows}
    seen: dict[str, int] = {}
    questions = []
    for number, row in rows:
        at = f'{path.name}, row {number}'
        if row['index'] in seen:
            raise EvaluationError(f'{at}: the index {row["index"]!r} is that of row {seen[row["index"]]} too.')
        seen[row['index']] = number
        questions.append(_question(path, at, row, pictures))
    if not questions:
        raise EvaluationError(f'{path.name} has no questions.')
    return DataSet(path.stem, questions)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows with their numbers, as an editor counts lines where no cell has several: the header is row 1."""
    csv.field_size_limit(sys.maxsize)
    number = 1
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file, delimiter='\t', strict=True)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                raise EvaluationError(
                    f'{path.name}: the column {missing[0]!r} is missing. A data set is a tab-separated file with the '
                    f'columns {", ".join(REQUIRED)} and pictures in "image" or "image_path".'
                )
            for row in reader:
                number += 1
                if None in row:
                    raise EvaluationError(f'{path.name}, row {number}: there are more cells than columns.')
                empty = [name for name in REQUIRED if not row[name]]
                if empty:
                    raise EvaluationError(f'{path.name}, row {number}: {empty[0]!r} is empty.')
                yield number, {name: value or '' for name, value in row.items()}
    except OSError as error:
        raise EvaluationError(f'{path} cannot be read: {error.strerror}.') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(
            f'{path.name}, row {number + 1}: this is not a tab-separated file in UTF-8 ({error}). A cell that begins '
            'with a quotation mark has to end with one.'
        ) from error


def _question(path: Path, at: str, row: Mapping[str, str], pictures: Mapping[str, str]) -> Question:
    folder = path.parent
    image, image_path = row.get('image', ''), row.get('image_path', '')
    shown = tuple(_from_cell(at, image, pictures)) if image else tuple(_from_files(at, folder, image_path))
    if not shown and (image or image_path):
        raise EvaluationError(f'{at}: the list of pictures is empty.')
    if not _listed(row['answer']):
        raise EvaluationError(f'{at}: the list of answers is empty.')
    video = row.get('video_path') or row.get('video', '')
    return Question(
        index=row['index'],
        text=row['question'],
        answer=row['answer'],
        pictures=shown,
        choices=_choices(row) or None,
        category=row.get('category') or None,
        hint=row.get('hint', ''),
        video=_video(at, folder, video) if video else None,
        subtitles=row.get('subtitles') or _subtitles(at, folder, row.get('subtitle_path', '')),
        group=image_path or (hashlib.sha256(' '.join(shown).encode()).hexdigest() if shown else row['index']),
    )


def _choices(row: Mapping[str, str]) -> dict[str, str]:
    if row.get('candidates'):
        # Each begins with its letter, as in "A. Apples."
        listed = zip(string.ascii_uppercase, _listed(row['candidates']), strict=False)
        return {letter: text.removeprefix(f'{letter}.').strip() for letter, text in listed}
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


def _from_cell(at: str, cell: str, pictures: Mapping[str, str]) -> Iterator[str]:
    """The pictures of an ``image`` cell; one of at most 64 characters names the row that has them."""
    if len(cell) <= LONGEST_INDEX and not cell.startswith('['):
        there = pictures.get(cell)
        if there is None:
            raise EvaluationError(f'{at}: "image" refers to the row with index {cell!r}, which is not there.')
        if len(there) <= LONGEST_INDEX:
            raise EvaluationError(f'{at}: "image" refers to the row with index {cell!r}, which has no picture itself.')
        cell = there
    for picture in _listed(cell):
        try:
            base64.b64decode(picture, validate=True)
        except (binascii.Error, ValueError) as error:
            raise EvaluationError(f'{at}: "image" is not base64 ({error}).') from error
        yield picture


def _from_files(at: str, folder: Path, cell: str) -> Iterator[str]:
    for name in _listed(cell) if cell else ():
        try:
            yield base64.b64encode((folder / name).read_bytes()).decode()
        except OSError as error:
            raise EvaluationError(f'{at}: the picture {name} cannot be read: {error.strerror}.') from error


def _video(at: str, folder: Path, name: str) -> Path:
    for suffix in VIDEO_SUFFIXES:
        path = folder / f'{name}{suffix}'
        if path.is_file():
            return path
    raise EvaluationError(f'{at}: there is no video {name} beside the file.')


def _subtitles(at: str, folder: Path, name: str) -> str:
    """The text of a SubRip file; nothing where there is none, as of many videos of Video-MME."""
    path = folder / name
    if not name or not path.is_file():
        return ''
    try:
        text = path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f'{at}: the subtitles {name} cannot be read ({error}).') from error
    spoken = re.sub(SUBRIP_TIMES, '', text, flags=re.MULTILINE)
    return '\n'.join(line.strip() for line in spoken.splitlines() if line.strip())


def _listed(cell: str) -> Sequence[str]:
    """What a cell holds: the strings of a list, or itself."""
    if cell.startswith('[') and cell.endswith(']'):
        try:
            return tuple(str(value) for value in ast.literal_eval(cell))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return (cell,)
    return (cell,)
