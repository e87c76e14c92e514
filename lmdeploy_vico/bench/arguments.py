"""The options of ``lmdeploy-vico bench``."""

import argparse
from pathlib import Path

from lmdeploy_vico.bench.workload.requests import AUTO, BASELINES, IMAGE, LLM, OURS, SERVER_OF_ENGINE, parse_compression

DESCRIPTION = """\
Measure first-token throughput as in Table 4 of the ViCO paper: requests with the same images and the same amount of
text, token compression 0 to 75 %, from 32 concurrent clients, one token each; speed-ups are against no compression in
the same run. Images are made and encoded, and texts cut to their exact length, before the clock starts.

  lmdeploy-vico bench --model DIR                       starts and stops lmdeploy serve api_server itself
  lmdeploy-vico bench --model DIR -- --tp 2             ... with more of its arguments
  lmdeploy-vico bench --base-url http://localhost:23333 measures a server that runs

The exit status is 0 when every request of the plugin's own cells was answered. That a baseline could not be measured is
said in its row and does not change it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; what follows ``--`` on the command line is for the server and handled by the caller."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--base-url', metavar='URL',
        help='a server that runs, such as http://localhost:23333, best started with LMDEPLOY_VICO_CACHE_BYTES=0 and '
        'without --enable-prefix-caching, as cells share pictures',
    )  # fmt: skip
    target.add_argument('--model', metavar='PATH', help='a checkpoint to serve for the time of the measurement')
    parser.add_argument('--mode', nargs='+', choices=(LLM, IMAGE), default=[IMAGE],
        help='image: from the bytes of real pictures to the first token; llm: the language model alone, with visual '
        'tokens that no ViT has computed, as the paper measures (default: image)',
    )  # fmt: skip
    parser.add_argument('--num-prompts', type=positive, default=2000, help='requests of each cell (default: 2000)')
    parser.add_argument('--max-concurrency', type=positive, default=32, help='requests at a time (default: 32)')
    parser.add_argument('--round-prompts', type=positive, metavar='N',
        help='requests of a cell before the next cell has its turn: fewer where other programs disturb, so that they '
        'disturb all cells alike (default: 8 for each at a time, at least 100)',
    )  # fmt: skip
    parser.add_argument('--tiles', type=positive, default=10, help='tiles of a request, thumbnail included (10)')
    parser.add_argument('--text-tokens', type=positive, nargs='+', default=[64, 512], help='(default: 64 512)')
    parser.add_argument('--token-compression', type=_compression, nargs='+', default=[0.0, 0.25, 0.5, 0.75, AUTO],
        metavar='SHARE', help='shares of visual tokens to remove, 0 to 0.75, or auto (default: 0 0.25 0.5 0.75 auto)',
    )  # fmt: skip
    parser.add_argument('--language-engine', nargs='+', choices=tuple(SERVER_OF_ENGINE), default=['pytorch'],
        metavar='ENGINE', help='what runs the language model of the plugin: pytorch, turbomind (experimental, needs a '
        'GPU), or both, each compared with itself without compression (default: pytorch)',
    )  # fmt: skip
    parser.add_argument('--baseline', nargs='+', choices=(OURS, *BASELINES), default=[OURS],
        help='none: the plugin without compression, always measured; lmdeploy-flash: LMDeploy without the plugin, '
        "whose answers are wrong after the first token; lmdeploy-internvl: LMDeploy's path for models without a "
        'router, on the same PyTorch engine; lmdeploy-turbomind: what LMDeploy chooses for this model on a GPU, which '
        'takes no notice of the router',
    )  # fmt: skip
    parser.add_argument('--servers', choices=('auto', 'together', 'in-turn'), default='auto',
        help='with baselines: all servers run while one of them is measured; or one server after the other and then in '
        'reverse, where they would not fit (default: together on a CPU, in-turn on a GPU)',
    )  # fmt: skip
    parser.add_argument('--images', type=positive, metavar='N',
        help='distinct pictures, most of a megabyte each in memory at 10 tiles (default: --num-prompts)',
    )  # fmt: skip
    parser.add_argument('--count-prefills', action='store_true',
        help="also count the engine's prefill steps: afterwards, with few requests, in the debug log of other servers "
        'started for it, since writing that log slows a server down',
    )  # fmt: skip
    parser.add_argument('--seed', type=natural, default=0, help='of pictures and texts (default: 0)')
    parser.add_argument('--request-timeout', type=float, default=600, metavar='SECONDS', help='(default: 600)')
    parser.add_argument('--output-file', type=Path, default=Path('first-token.json'), metavar='FILE',
        help='results as JSON, written again after every round (default: first-token.json)',
    )  # fmt: skip
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='also draw the results')


def natural(text: str) -> int:
    """A number of at least 0; argparse makes a message of the error."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """A number of at least 1; argparse makes a message of the error."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'takes a whole number, not {text!r}') from error
    if number < least:
        raise argparse.ArgumentTypeError(f'must be at least {least}, not {text}')
    return number


def _compression(text: str) -> float | str:
    try:
        return parse_compression(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
