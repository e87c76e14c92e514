"""What the reader answers through a server, by compression: the paper's Tables 1, 2 and 3 in small.

    lmdeploy-vico reader RUN --train
    python -m benchmarks reader --run RUN

Held-out documents, whose codes are withheld from training. Pictures of several tiles (Table 1) and several pictures
(Table 2) at none, auto and all; then, on the same prompts, the router against as many tiles drawn by lot, against whole
images by their mean score, and against the model before consistency training with the same router (Table 3).
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.lib.facts import facts
from benchmarks.reader.asking import Client, compressed, everywhere, tiles
from benchmarks.reader.scores import calibrate
from benchmarks.reader.statistics import Resampling, right
from lmdeploy_vico.evaluation.answers import Answer
from lmdeploy_vico.evaluation.data import DataSet, Question, read
from lmdeploy_vico.launch import ApiServer
from lmdeploy_vico.reader.documents.export import write_questions
from lmdeploy_vico.reader.documents.page import KINDS
from lmdeploy_vico.reader.recipe import READER, ROUTED, VICO
from lmdeploy_vico.training.stages.consistency import REPORT

RESULTS = Path(__file__).parents[1] / 'results' / 'reader-cpu.json'
ABLATED = 'several tiles'
Answers = dict[str, dict[str, Answer]]


@dataclass(frozen=True)
class Set:
    """Documents to ask about.

    Attributes:
        seed: of what is drawn.
        tiles: how many a picture has, in turn.
        separate: whether these are pictures of their own.
        share: how many questions there are, to those of the main set.
    """

    seed: int
    tiles: tuple[int, ...]
    separate: bool = False
    share: float = 0.5


SETS = {
    'one tile': Set(11, (1,)),
    'several tiles': Set(12, (3, 5), share=1),
    'several pictures': Set(13, (2, 3), separate=True),
    'calibration': Set(14, (3, 5), share=3),
}
# Two questions about a picture's tiles of a kind: many pictures, and print does not outnumber the rest.
PER_KIND = 2


def main(argv: Sequence[str]) -> int:
    """Ask, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, required=True, metavar='DIR', help='of `lmdeploy-vico reader DIR --train`')
    parser.add_argument(
        '--questions',
        type=int,
        default=600,
        help='about pictures of several tiles; half as many about others (default: 600)',
    )
    parser.add_argument('--output-file', type=Path, default=RESULTS, help=f'(default: {RESULTS.name})')
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments.run, arguments.questions, Path(folder), console)
    arguments.output_file.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    print(json.dumps(results, indent=2))
    return 0


def measure(run: Path, questions: int, folder: Path, console: Console) -> dict[str, Any]:
    """All tables, as JSON has them."""
    data = {name: documents(folder, name, each, round(each.share * questions)) for name, each in SETS.items()}
    calibration = calibrate(run / READER, data['calibration'])
    tables: dict[str, Any] = {}
    hits: dict[str, Any] = {}
    scratch = folder / 'answers'
    scratch.mkdir()
    main_set = data[ABLATED]
    with ApiServer(run / READER, log=folder / 'reader.log') as server:
        client = Client(server, console, scratch)
        for name in ('one tile', 'several tiles', 'several pictures'):
            answers = client.ask(data[name], everywhere(data[name], 'none', 'auto', 'all'))
            tables[name] = table(data[name].questions, answers)
            hits[name] = {way: marks(data[name].questions, given) for way, given in answers.items()}
            if name == ABLATED:
                ours = answers
        [whole] = everywhere(main_set, f'image:{calibration.threshold:.6f}').values()
        ours |= client.ask(main_set, {'random': lots(main_set, ours), 'image': whole})
    with ApiServer(run / ROUTED, log=folder / 'vanilla.log') as server:
        theirs = Client(server, console, scratch).ask(main_set, everywhere(main_set, 'none', 'auto', 'all'))
    ours |= {f'vanilla, {way}': answers for way, answers in theirs.items()}
    return {
        'conditions': {**facts(), 'questions': questions, 'calibration': asdict(calibration)},
        'divergence': json.loads((run / VICO / REPORT).read_text(encoding='utf-8')),
        'router': json.loads((run / READER / REPORT).read_text(encoding='utf-8')),
        'tables': tables,
        'hits': hits,
        'ablation': ablation(main_set.questions, ours),
    }


def documents(folder: Path, name: str, each: Set, count: int) -> DataSet:
    """Render documents and read them as any data set is read."""
    path = folder / f'{name}.tsv'
    write_questions(path, each.seed, count, KINDS, each.tiles, each.separate, PER_KIND)
    return read(path)


def table(questions: Sequence[Question], answers: Answers) -> dict[str, Any]:
    """Right answers and compressed tiles at each compression, of all questions and of each kind."""
    kinds = {'all kinds': list(questions)}
    for question in questions:
        kinds.setdefault(str(question.category), []).append(question)
    return {kind: {way: line(these, answers[way], answers['none']) for way in answers} for kind, these in kinds.items()}


def line(questions: Sequence[Question], answers: dict[str, Answer], full: dict[str, Answer]) -> dict[str, Any]:
    """One line of a table."""
    resampling = Resampling(questions)
    hits, before = right(questions, answers), right(questions, full)
    return {
        'questions': len(questions),
        'right': resampling.mean(hits).as_json(),
        'retained': resampling.ratio(hits, before).as_json(),
        'lost points': resampling.mean(before - hits).as_json(),
        'compressed tiles': round(100 * _share(questions, answers, full), 1),
        'prompt tokens': round(float(np.mean([answers[question.index].prompt_tokens for question in questions]))),
    }


def marks(questions: Sequence[Question], answers: dict[str, Answer]) -> str:
    """Question by question, 1 if it was answered rightly and 0 if not."""
    return ''.join(str(int(hit)) for hit in right(questions, answers))


def _share(questions: Sequence[Question], answers: dict[str, Answer], full: dict[str, Answer]) -> float:
    return sum(compressed(answers[each.index], full[each.index]) for each in questions) / sum(
        tiles(full[each.index]) for each in questions
    )


def lots(data: DataSet, answers: Answers) -> dict[str, str]:
    """For each question the experiment that compresses as many tiles as the router does, drawn by lot."""
    auto, none = answers['auto'], answers['none']
    shares = {
        question.index: compressed(auto[question.index], none[question.index]) / tiles(none[question.index])
        for question in data.questions
    }
    return {index: f'random:{each:.6f}' for index, each in shares.items()}


def ablation(questions: Sequence[Question], answers: Answers) -> dict[str, Any]:
    """Each way on the same prompts, and how much better the router's is: paired differences in points."""
    for question in questions:
        counts = {
            compressed(answers[way][question.index], answers['none'][question.index])
            for way in ('auto', 'random', 'vanilla, auto')
        }
        assert len(counts) == 1, 'the same number of tiles is compressed, prompt by prompt'
    resampling = Resampling(questions)
    auto = right(questions, answers['auto'])
    lines = {way: line(questions, given, answers['none']) for way, given in answers.items()}
    better = {
        f'auto - {way}': resampling.mean(auto - right(questions, answers[way])).as_json()
        for way in ('all', 'random', 'image', 'vanilla, auto')
    }
    return {'lines': lines, 'differences in points': better}
