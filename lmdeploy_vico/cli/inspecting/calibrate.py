"""``lmdeploy-vico calibrate``: find the router's threshold that compresses as much as an operator wants."""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.arguments import positive
from lmdeploy_vico.cli.errors import CommandError, require_checkpoint
from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.rules import RULES
from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.launch import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.progress import Progress

    from lmdeploy_vico.cli import Commands
    from lmdeploy_vico.inspection.calibration import Calibration, Point, Scored
    from lmdeploy_vico.inspection.findings import Judged
    from lmdeploy_vico.inspection.quality import Judge
    from lmdeploy_vico.vision.encoder import VisionEncoder

TARGET = 0.5
LOG_WIDTH = 120  # of the tables, where no terminal says how wide it is
DESCRIPTION = """\
Score the operator's own pictures, and find the absolute threshold of the routing rule that compresses a target share of
their tiles. Each picture is taken as a prompt by itself. The folders inside --images are kinds of pictures, which are
reported apart. The last line is the command that starts a server with that threshold.

With --eval, a data set's questions are asked at thresholds from none to all that can be compressed, so that what each
costs in answers is known before it is chosen. A server of the model is started for that; arguments after -- are its.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser(
        'calibrate',
        help="find the router's threshold for your pictures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--model', required=True, metavar='DIR', type=Path, help='a ViCO checkpoint')
    parser.add_argument('--images', required=True, metavar='DIR', type=Path, help='a folder of pictures, or of folders')
    parser.add_argument('--target-compression', type=_share, default=TARGET, metavar='SHARE',
        help='of the tiles, how many shall get 64 tokens, from 0 to 1 (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--eval', type=Path, metavar='FILE.tsv', help='a data set of `lmdeploy-vico eval`, for scores')
    parser.add_argument(
        '--rule', choices=RULES, help='of --eval: how answers are judged (default: by the name of the file)'
    )
    parser.add_argument('--instruction', metavar='TEXT', help="of --eval: ends every question (default: the rule's)")
    parser.add_argument(
        '--max-tokens', type=positive, default=64, help='of --eval: of an answer (default: %(default)s)'
    )
    parser.add_argument(
        '--answers',
        type=Path,
        default=Path('calibration.answers.jsonl'),
        metavar='FILE',
        help='of --eval: keeps answers, so that a command that was interrupted goes on (default: %(default)s)',
    )
    parser.add_argument('--base-url', metavar='URL', help='of --eval: a server of the model that runs already')
    parser.add_argument('--device', help='of torch, for scores (default: the first GPU, or the CPU without one)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of tables')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw shares, and scores, against the threshold')
    parser.set_defaults(run=run)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f'must be a number from 0 to 1, not {text!r}')


def run(arguments: argparse.Namespace) -> int:
    """Score, calibrate, ask and print.

    Raises:
        CommandError: something that was given cannot be used, a package is missing, or a server did not start.
    """
    try:
        from rich.console import Console

        from lmdeploy_vico.inspection import findings, quality  # noqa: F401  (what is missing is said first)
    except ImportError as error:
        raise CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[eval]"') from error
    console = Console(stderr=True, highlight=False)
    try:
        _run(arguments, console)
    except (BenchError, InspectionError, EvaluationError, UnsupportedCheckpointError, ServerError) as error:
        raise CommandError(str(error)) from error
    return 0


def _run(arguments: argparse.Namespace, console: 'Console') -> None:
    from lmdeploy_vico.bench.report.table import check_plot
    from lmdeploy_vico.inspection.calibration import Calibration
    from lmdeploy_vico.inspection.findings import draw
    from lmdeploy_vico.inspection.pictures import find_by_kind
    from lmdeploy_vico.inspection.routed import device_of
    from lmdeploy_vico.vision.encoder import VisionEncoder

    require_checkpoint(arguments.model)
    config = VicoConfig.from_pretrained(arguments.model)
    if arguments.plot:
        check_plot(arguments.plot)
    pictures, judge = find_by_kind(arguments.images), _judge(arguments)
    encoder = VisionEncoder.from_pretrained(arguments.model, device_of(arguments.device))
    calibration = Calibration(_score(encoder, pictures, console), config.relative_threshold)
    before, after = calibration.at(config.absolute_threshold), calibration.nearest(arguments.target_compression)
    judged = _ask(arguments, judge, encoder, calibration, [before, after], console) if judge else []
    if arguments.json:
        print(json.dumps(_as_json(arguments, calibration, before, after, judged), indent=2))
    else:
        _print(arguments, calibration, before, after, judged)
    if arguments.plot:
        draw(arguments.plot, calibration, after, judged)


def _judge(arguments: argparse.Namespace) -> 'Judge | None':
    from lmdeploy_vico.evaluation.data import read
    from lmdeploy_vico.evaluation.rules import choose, named
    from lmdeploy_vico.inspection.quality import Judge

    if arguments.server_arguments and (arguments.eval is None or arguments.base_url):
        raise CommandError('Arguments after -- are for a server that is started here: with --eval, without --base-url.')
    if arguments.eval is None:
        return None
    data = read(arguments.eval)
    rule = named(arguments.rule) if arguments.rule else choose(data.name, data.questions)
    return Judge(data, rule, arguments.instruction, arguments.max_tokens)


def _score(encoder: 'VisionEncoder', pictures: 'Sequence[tuple[str, Path]]', console: 'Console') -> 'list[Scored]':
    from rich.progress import Progress

    from lmdeploy_vico.inspection.calibration import Scored
    from lmdeploy_vico.inspection.pictures import PictureReader

    scored = []
    with PictureReader() as reader, Progress(console=console, transient=True) as progress:
        for kind, path in progress.track(pictures, description='scoring'):
            [result] = encoder.encode([reader.read(path)], 'none')
            scored.append(Scored(str(path), kind, result.scores))
    return scored


def _ask(
    arguments: argparse.Namespace,
    judge: 'Judge',
    encoder: 'VisionEncoder',
    calibration: 'Calibration',
    wanted: 'Sequence[Point]',
    console: 'Console',
) -> 'list[Judged]':
    """Scores at the thresholds of the curve and at those that are wanted; shares are those of the questions."""
    from rich.progress import Progress

    from lmdeploy_vico.inspection.calibration import Calibration
    from lmdeploy_vico.inspection.pictures import PictureReader
    from lmdeploy_vico.inspection.quality import ask, score_questions

    thresholds = sorted({point.threshold for point in (*calibration.curve(), *wanted)}, reverse=True)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True))
        with PictureReader() as reader:
            task = progress.add_task('scoring questions', total=len(judge.data.questions))
            scored = score_questions(encoder, reader, judge.data, lambda: progress.advance(task))
        questions = Calibration(scored, calibration.relative_threshold)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='vico-calibrate-')))
        url = arguments.base_url or _start(arguments, scratch, stack, console)
        points = [questions.at(threshold) for threshold in thresholds]
        return ask(url, judge, questions, points, arguments.answers, _asking(progress))


def _asking(progress: 'Progress') -> 'Callable[[int, int], object]':
    task = progress.add_task('asking', total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _start(arguments: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack, console: 'Console') -> str:
    from lmdeploy_vico.launch import ApiServer

    server = ApiServer(arguments.model, *arguments.server_arguments, log=scratch / 'server.log', timeout=1800)
    console.print(f'$ {" ".join(server.command)}', markup=False, soft_wrap=True)
    stack.enter_context(server)
    return server.url


def _line(arguments: argparse.Namespace, calibration: 'Calibration', after: 'Point') -> str:
    """The command that starts a server with a threshold."""
    overrides = {
        'flash_relative_threshold': calibration.relative_threshold,
        'flash_absolute_threshold': after.threshold,
    }
    return f"lmdeploy serve api_server {arguments.model} --hf-overrides '{json.dumps(overrides)}'"


def _as_json(
    arguments: argparse.Namespace,
    calibration: 'Calibration',
    before: 'Point',
    after: 'Point',
    judged: 'Sequence[Judged]',
) -> dict[str, Any]:
    return {
        'model': str(arguments.model),
        'pictures': len(calibration.prompts),
        'tiles': before.tiles,
        'relative_threshold': calibration.relative_threshold,
        'checkpoint': before.as_json(),
        'target_compression': arguments.target_compression,
        'chosen': after.as_json(),
        'most': calibration.most.as_json(),
        'curve': [point.as_json() for point in calibration.curve()],
        'kinds': {kind: point.as_json() for kind, point in calibration.by_kind(after.threshold).items()},
        'scores': [
            {
                **point.as_json(),
                'score': result.score,
                'retention': [result.retention, result.retention_low, result.retention_high],
            }
            for point, result in judged
        ],
        'command': _line(arguments, calibration, after),
    }


def _print(
    arguments: argparse.Namespace,
    calibration: 'Calibration',
    before: 'Point',
    after: 'Point',
    judged: 'Sequence[Judged]',
) -> None:
    from rich.console import Console

    from lmdeploy_vico.inspection.findings import kinds_table, points_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(kinds_table(calibration, before, after))
    if judged:
        console.print(points_table(judged))
    most = calibration.most
    if arguments.target_compression > most.share:
        console.print(
            f'No threshold compresses {arguments.target_compression:.0%} of these tiles: at most {most.share:.0%} can '
            'be, since the rule keeps the lowest scores of each prompt.',
            soft_wrap=True,
        )
    console.print(
        f'At {after.threshold:g} {after.compressed} of {after.tiles} tiles get 64 tokens ({after.share:.1%}); the '
        f"checkpoint's own threshold, {before.threshold:g}, compresses {before.share:.1%}. Start a server with it:",
        soft_wrap=True,
    )
    console.print(_line(arguments, calibration, after), markup=False, soft_wrap=True)
