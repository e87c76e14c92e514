"""Answers as they come, kept in a file, so that an evaluation that was interrupted goes on where it stopped."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lmdeploy_vico.evaluation import EvaluationError

Key = tuple[str, str, str]  # data set, index of the question, compression


@dataclass(frozen=True)
class Answer:
    """What the server said to one question at one compression.

    Attributes:
        data: the name of the data set.
        index: of the question.
        compression: as the command line has it.
        text: of the answer.
        prompt_tokens: from the server's usage, as the next.
        image_tokens: visual tokens among them; None if the server does not say.
        error: why there is no answer; None if there is one.
        asked: digest of what was asked (:func:`~lmdeploy_vico.evaluation.prompts.digest`).
    """

    data: str
    index: str
    compression: str
    text: str = ''
    prompt_tokens: int = 0
    image_tokens: int | None = None
    error: str | None = None
    asked: str = ''

    @property
    def key(self) -> Key:
        """What it answers."""
        return self.data, self.index, self.compression


class AnswerFile:
    """A file with a line of JSON for the settings and one for each answer. A context manager.

    Args:
        path: of the file; it is continued if it is there.
        settings: what all answers depend on. What a single one depends on is in its digest.

    Raises:
        EvaluationError: the file is of an evaluation with other settings, or is none, or cannot be read or written.

    Attributes:
        answers: those that need not be asked for again. Questions that failed are asked again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self.answers: dict[Key, Answer] = {}
        self._file: TextIO | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            first, *lines = self._path.read_text(encoding='utf-8').splitlines() or ['{}']
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f'{self._path} cannot be read ({error}).') from error
        try:
            there = json.loads(first)
        except ValueError:
            there = None
        if there != self._settings:
            changed = [
                name
                for name, value in self._settings.items()
                if not isinstance(there, dict) or there.get(name) != value
            ]
            raise EvaluationError(
                f'{self._path} holds answers of another evaluation ({", ".join(changed) or "other settings"} differ). '
                'Remove it, or name another --output-file.'
            )
        for number, line in enumerate(lines, 2):
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number == len(lines) + 1:  # a process that was killed may have left half a line
                    break
                raise EvaluationError(f'{self._path}, line {number}, is no answer: remove the file.') from error
            if answer.error is None:
                self.answers[answer.key] = answer

    def __enter__(self) -> 'AnswerFile':
        # Written again, so that half a line and failures are gone; beside the old file, so that no kill loses answers.
        draft = self._path.with_name(f'{self._path.name}.part')
        self._file = self._open(draft)
        self._write(self._settings)
        for answer in self.answers.values():
            self._write(asdict(answer))
        try:
            draft.replace(self._path)
        except OSError as error:
            raise self._not_written(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def keep(self, answer: Answer) -> None:
        """Add an answer, or a failure, and write it."""
        self.answers[answer.key] = answer
        self._write(asdict(answer))

    def _open(self, path: Path) -> TextIO:
        try:
            return path.open('w', encoding='utf-8')
        except OSError as error:
            raise self._not_written(error) from error

    def _write(self, value: Any) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(value) + '\n')
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> EvaluationError:
        return EvaluationError(f'{self._path} cannot be written: {error.strerror}.')
