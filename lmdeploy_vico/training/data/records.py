"""InternVL's training data: files of one JSON object a line, and the meta file that lists several of them."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.wording import shown

IMAGE = '<image>'  # stands for an image in a human's turn
CONFIG_FILE = 'config.json'
ROLES = {'system': 'system', 'human': 'user', 'gpt': 'assistant'}
# Keys of InternVL's meta files that change the data.
NOT_SUPPORTED = ('max_dynamic_patch', 'min_dynamic_patch', 'data_augment')


class DataError(TrainingError):
    """A sample or a file of samples is wrong; the message names the file and, of a sample, the line."""


@dataclass(frozen=True)
class Turn:
    """What one side says: ``role`` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One sample as it is written.

    Attributes:
        place: its file and line, for messages.
        images: the files that stand where the turns of the user have ``<image>``, in that order.
        turns: an optional system turn, then user and assistant in turn; the assistant has the last word.
    """

    place: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Source:
    """A file of samples.

    Attributes:
        annotation: the JSONL file.
        root: the folder that paths of images are relative to.
        repeat_time: how often it is seen in a pass over the data; a fraction takes a random part of it.
    """

    annotation: Path
    root: Path
    repeat_time: float = 1.0


@dataclass
class _Lines:
    """Where the samples of a file begin: it is not kept in memory, as it may have millions."""

    source: Source
    offsets: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


class Records:
    """The samples of a ``.jsonl`` file, or of all files of a meta ``.json`` file with their repetitions.

    Args:
        path: the file. Relative paths in a meta file are relative to its folder; images of a ``.jsonl`` file that is
            given directly are relative to its own.
        seed: of the choice that a fractional ``repeat_time`` makes.

    Raises:
        DataError: a file is missing, is no such file, or has no samples.
    """

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        self._files = [_index(source) for source in sources(Path(path))]
        self._order = [
            (file, line)
            for file, lines in enumerate(self._files)
            for line in _repeated(len(lines.offsets), lines.source.repeat_time, seed)
        ]
        if not self._order:
            raise DataError(f'{path} has no samples.')

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Record:
        """Read a sample; raises DataError if it is malformed."""
        file, line = self._order[index]
        lines = self._files[file]
        with lines.source.annotation.open('rb') as opened:
            opened.seek(lines.offsets[line])
            return parse(opened.readline(), lines.source, lines.numbers[line])

    def line(self, index: int) -> tuple[int, int]:
        """The number of a sample's file and line: the same wherever the sample is repeated."""
        return self._order[index]

    def distinct(self) -> list[int]:
        """An index of each sample that is seen, once however often it is repeated."""
        return sorted({line: index for index, line in reversed(list(enumerate(self._order)))}.values())


def sources(path: Path) -> list[Source]:
    """The files of samples that ``path`` stands for; see :class:`Records`."""
    if not path.is_file():
        raise DataError(f'{path} does not exist or is not a file.')
    if path.suffix != '.json':
        return [Source(path, path.parent)]
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        return [_source(name, entry, path) for name, entry in meta.items()]
    except (ValueError, AttributeError) as error:
        raise DataError(f'{path} is not a meta file, a JSON object of data sets by name: {error}.') from error


def deciding_files(checkpoints: Iterable[Path], data: Iterable[Path | None]) -> list[Path]:
    """The files that say which models and samples a run has; weights and images themselves are too large to compare."""
    files = [directory / name for directory in checkpoints for name in (CONFIG_FILE, INDEX_FILE)]
    for path in data:
        files += [path, *(source.annotation for source in sources(path))] if path else []
    return list(dict.fromkeys(files))


def _source(name: str, entry: Any, path: Path) -> Source:
    annotation = entry.get('annotation') if isinstance(entry, dict) else None
    if not isinstance(annotation, str):
        raise DataError(f'{path}: {name} needs "annotation", the path of a JSONL file.')
    refused = [key for key in NOT_SUPPORTED if entry.get(key)]
    if refused:
        raise DataError(f'{path}: {refused[0]} of {name} is not supported: images are cut as a server cuts them.')
    repeat = entry.get('repeat_time', 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < math.inf:
        raise DataError(f'{path}: repeat_time of {name} must be a number from 0, not {shown(repeat)}.')
    source = Source(path.parent / annotation, path.parent / str(entry.get('root', '')), float(repeat))
    if not source.annotation.is_file():
        raise DataError(f'{path}: the annotation of {name}, {source.annotation}, does not exist.')
    return source


def _index(source: Source) -> _Lines:
    lines, offset = _Lines(source), 0
    with source.annotation.open('rb') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                lines.offsets.append(offset)
                lines.numbers.append(number)
            offset += len(line)
    return lines


def _repeated(count: int, times: float, seed: int) -> Iterator[int]:
    """Every line as often as the whole part says, and as many of a random order as the rest does."""
    whole = int(times)
    for _ in range(whole):
        yield from range(count)
    part = round((times - whole) * count)
    yield from sorted(np.random.default_rng(seed).permutation(count)[:part].tolist())


def parse(line: bytes, source: Source, number: int) -> Record:
    """Read a line of a JSONL file.

    Raises:
        DataError: it is no JSON object, its turns are out of order or empty, an image does not exist, or the number of
            ``<image>`` is not that of the images.
    """
    place = f'{source.annotation}, line {number}'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f'{place}: this is not JSON: {error}.') from error
    if not isinstance(entry, dict):
        raise DataError(f'{place}: a sample is a JSON object, not {shown(entry)}.')
    images = _images(entry.get('image'), source.root, place)
    turns = _turns(entry.get('conversations'), place)
    return Record(place, images, _placed(turns, len(images), place))


def _images(value: Any, root: Path, place: str) -> tuple[Path, ...]:
    names = [] if value is None or value == '' else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f'{place}: "image" is a path or a list of paths, not {shown(value)}.')
    paths = tuple(root / name for name in names)
    for path in paths:
        if not path.is_file():
            raise DataError(f'{place}: the image {path} does not exist.')
    return paths


def _turns(value: Any, place: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{place}: "conversations" must be a list of turns.')
    turns = []
    for entry in value:
        role = ROLES.get(str(entry.get('from'))) if isinstance(entry, dict) else None
        if role is None or not isinstance(entry.get('value'), str):
            raise DataError(f'{place}: a turn is {{"from": "human", "gpt" or "system", "value": a text}}.')
        turns.append(Turn(role, entry['value']))
    spoken = [turn.role for turn in turns if turn.role != 'system']
    in_order = all(role == ('user', 'assistant')[i % 2] for i, role in enumerate(spoken))
    if not in_order or len(spoken) % 2 or not spoken or any(turn.role == 'system' for turn in turns[1:]):
        raise DataError(
            f'{place}: turns must be of "human" and "gpt" in turn, the last of "gpt"; one of "system" may come first.'
        )
    if any(turn.role == 'assistant' and not turn.text.strip() for turn in turns):
        raise DataError(f'{place}: the response of "gpt" is empty.')
    return tuple(turns)


def _placed(turns: tuple[Turn, ...], images: int, place: str) -> tuple[Turn, ...]:
    """The turns with an ``<image>`` for each image; one image that has none goes before the first question."""
    first = next(i for i, turn in enumerate(turns) if turn.role == 'user')
    count = sum(turn.text.count(IMAGE) for turn in turns if turn.role == 'user')
    if images == 1 and count == 0:
        return (*turns[:first], Turn('user', f'{IMAGE}\n{turns[first].text}'), *turns[first + 1 :])
    if count != images:
        raise DataError(f'{place}: the turns of "human" have {count} {IMAGE} for {images} images.')
    return turns
