"""The options of ``lmdeploy-vico eval``."""

import argparse
from pathlib import Path

from lmdeploy_vico.bench.arguments import positive
from lmdeploy_vico.choices import parse_compression, typed
from lmdeploy_vico.evaluation.rules import RULES
from lmdeploy_vico.evaluation.scores import NONE

DESCRIPTION = """\
Judge what compression costs in answers: every question of a data set is asked at every compression, and what is kept of
the score without compression is reported with a 95 % interval, as in Tables 1 and 2 of the ViCO paper.

  lmdeploy-vico eval --base-url http://localhost:23333 --data DocVQA_VAL.tsv
  lmdeploy-vico eval --model DIR --data ChartQA_TEST.tsv MME.tsv --compression none auto all -- --tp 2

Data sets are VLMEvalKit's tab-separated files. Answers are kept beside --output-file as they come: a command that was
interrupted goes on where it stopped. The exit status is 0 when every question was answered.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; what follows ``--`` on the command line is for the server and handled by the caller."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--base-url', metavar='URL', help='a server that runs, such as http://localhost:23333')
    target.add_argument('--model', metavar='PATH', help='a checkpoint to serve for the time of the evaluation')
    parser.add_argument('--api-key', metavar='KEY', help='sent to the server of --base-url')
    parser.add_argument('--data', type=Path, nargs='+', required=True, metavar='FILE.tsv',
        help='data sets; pictures and videos that a file names are looked for beside it',
    )  # fmt: skip
    parser.add_argument('--rule', choices=RULES,
        help='how all answers are judged (default: by the name of the file, such as ChartQA_TEST; else "choice" where '
        'there are choices, "exact" where there are none)',
    )  # fmt: skip
    parser.add_argument('--compression', type=compression, nargs='+', default=[NONE, 'auto', 'all'], metavar='VALUE',
        help='auto, none, all, a share of the tiles from 0 to 1, or the experiments random:SHARE and image:SCORE; none '
        'is always asked, since the others are compared with it (default: none auto all)',
    )  # fmt: skip
    parser.add_argument(
        '--max-tiles', type=positive, metavar='N', help="tiles of a picture at most (default: the server's)"
    )
    parser.add_argument('--frames', type=positive, default=64, help='of a video (default: 64)')
    parser.add_argument('--subtitles', action='store_true', help='show those of a video')
    parser.add_argument('--max-tokens', type=positive, default=64, help='of an answer (default: 64)')
    parser.add_argument('--instruction', metavar='TEXT',
        help="ends every question (default: the rule's, which asks for a single word, a letter, or yes or no)",
    )  # fmt: skip
    parser.add_argument('--limit', type=positive, metavar='N', help='ask the first N questions of each data set only')
    parser.add_argument('--max-concurrency', type=positive, default=32, help='requests at a time (default: 32)')
    parser.add_argument('--request-timeout', type=float, default=600, metavar='SECONDS', help='(default: 600)')
    parser.add_argument('--output-file', type=Path, default=Path('evaluation.json'), metavar='FILE',
        help='results as JSON; answers go to FILE.answers.jsonl (default: evaluation.json)',
    )  # fmt: skip
    parser.add_argument('--plot', type=Path, metavar='FILE.png',
        help='also draw scores, against first-token throughput where --bench-results are given',
    )  # fmt: skip
    parser.add_argument('--bench-results', type=Path, metavar='FILE.json',
        help='what `lmdeploy-vico bench` measured of the same model, for --plot',
    )  # fmt: skip


def compression(text: str) -> str:
    """A compression as the command line has it; argparse makes a message of the error."""
    try:
        parse_compression(typed(text), '--compression')
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
