"""What a data set scores at the points of a calibration, through one server.

A threshold compresses of each prompt its tiles with the highest scores. So does a request that names their share, and
one server answers for all thresholds.
"""

import asyncio
import base64
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdeploy_vico.choices import typed
from lmdeploy_vico.evaluation.answers import Answer, AnswerFile
from lmdeploy_vico.evaluation.client import Server, Task, ask_all, is_answered
from lmdeploy_vico.evaluation.data import DataSet
from lmdeploy_vico.evaluation.prompts import Asking
from lmdeploy_vico.evaluation.rules.rule import Rule
from lmdeploy_vico.evaluation.scores import NONE, Result, results
from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.inspection.calibration import Calibration, Point, Scored
from lmdeploy_vico.inspection.pictures import PictureReader
from lmdeploy_vico.vision.encoder import VisionEncoder

CONCURRENCY = 16
TIMEOUT = 600.0  # seconds for an answer


@dataclass(frozen=True)
class Judge:
    """How a data set is asked.

    Attributes:
        data: its questions.
        rule: that judges answers.
        instruction: that ends every question; None for the rule's own.
        max_tokens: of an answer.
    """

    data: DataSet
    rule: Rule
    instruction: str | None
    max_tokens: int


def score_questions(
    encoder: VisionEncoder, reader: PictureReader, data: DataSet, done: Callable[[], object]
) -> list[Scored]:
    """The router's scores of what each question shows; pictures that were seen before are not scored again.

    Args:
        encoder: of the checkpoint.
        reader: decodes the pictures.
        data: the questions.
        done: called after each question.

    Raises:
        InspectionError: a question shows a video, or a picture that cannot be read.
    """
    seen: dict[str, Sequence[float]] = {}
    scored = []
    for question in data.questions:
        if question.video is not None:
            raise InspectionError(f'{data.name}, {question.index}: questions about videos cannot be calibrated with.')
        for encoded in question.pictures:
            if encoded not in seen:
                image = reader.decode(f'{data.name}, {question.index}', base64.b64decode(encoded))
                [result] = encoder.encode([image], 'none')
                seen[encoded] = result.scores
        scores = [score for encoded in question.pictures for score in seen[encoded]]
        scored.append(Scored(question.index, data.name, scores))
        done()
    return scored


def ask(
    url: str,
    judge: Judge,
    calibration: Calibration,
    points: Sequence[Point],
    kept: Path,
    done: Callable[[int, int], object],
) -> list[tuple[Point, Result]]:
    """The score at each point, beside that without compression.

    Args:
        url: of a server of the model.
        judge: whose questions are asked.
        calibration: of the questions, prompt by prompt.
        points: that are judged.
        kept: a file for the answers; those that are in it already are not asked for.
        done: called after each answer with their number so far, and that of all.

    Raises:
        InspectionError: a question was not answered.
        EvaluationError: no server answers.
    """
    wanted = {
        (question.index, str(point.threshold)): _share(calibration.chosen(prompt, point.threshold))
        for question, prompt in zip(judge.data.questions, calibration.prompts, strict=True)
        for point in points
    }
    wanted |= {(question.index, NONE): NONE for question in judge.data.questions}
    todo: list[Task] = [
        (judge.data, judge.rule, question, compression)
        for question in judge.data.questions
        for compression in {value for (index, _), value in wanted.items() if index == question.index}
    ]
    count = itertools.count(1)
    answers = asyncio.run(_ask_all(url, judge, todo, kept, lambda _: done(next(count), len(todo))))
    failed = [answer for answer in answers.values() if answer.error]
    if failed:
        raise InspectionError(f'{len(failed)} questions were not answered, the first with: {failed[0].error}')
    by_point = {
        (judge.data.name, index, label): dataclasses.replace(
            answers[judge.data.name, index, compression], compression=label
        )
        for (index, label), compression in wanted.items()
    }
    labels = [NONE, *(str(point.threshold) for point in points)]
    found = {
        result.compression: result
        for result in results(judge.data, judge.rule, labels, by_point)
        if result.category is None
    }
    return [(point, found[str(point.threshold)]) for point in points]


def _share(compressed: Sequence[bool]) -> str:
    """The compression of a request that compresses as many tiles."""
    return f'{sum(compressed) / len(compressed):.6f}' if any(compressed) else NONE


async def _ask_all(
    url: str, judge: Judge, todo: Sequence[Task], kept: Path, done: Callable[[Answer], object]
) -> Mapping[tuple[str, str, str], Answer]:
    async with Server(url, TIMEOUT) as server:
        asking = Asking(await server.model(), judge.max_tokens, instruction=judge.instruction)
        file = AnswerFile(kept, dataclasses.asdict(asking))
        missing = [task for task in todo if not is_answered(task, file, asking)]
        with file:
            await ask_all(server, missing, asking, typed, CONCURRENCY, file, done)
    return file.answers
