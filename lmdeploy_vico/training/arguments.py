"""The options of ``lmdeploy-vico train``. Imports nothing heavy."""

import argparse
from pathlib import Path

TRAIN = """\
Make a plain InternVL3.5 checkpoint a ViCO one that is served with fewer visual tokens (paper, section 3):

  lmdeploy-vico train init InternVL3_5-8B START
  torchrun --nproc-per-node 8 -m lmdeploy_vico.cli train consistency \\
      --model START --reference InternVL3_5-8B --data meta.json --output VICO
  lmdeploy-vico train router --model VICO --reference InternVL3_5-8B --data meta.json --output FLASH
  lmdeploy serve api_server FLASH

Data are InternVL's: a JSONL file of samples, or a meta JSON file that names several. A command that was interrupted
goes on where it stopped when it is repeated.
"""
CONSISTENCY = """\
Consistency training (paper, section 3.1). First mlp2 alone is warmed up on samples whose tiles are all compressed. Then
a share of each sample's tiles, drawn uniformly from 0 to 1, is compressed, and the model is to give the response's
tokens the distributions that the frozen reference gives them without any compression (Eq. 1).
"""
ROUTER = """\
Router training (paper, section 3.2). For one random tile of each sample, the loss with that tile compressed is set in
relation to the loss with none compressed (Eq. 2). The router learns whether this ratio is below the percentile of a
sliding window (Eq. 3, 4). Ratios are computed once and kept in OUTPUT/ratios-*.jsonl.
"""
MAX_LENGTH = 32768  # tokens of a sample with all tiles at 256 (paper, section 4.1)
MAX_TILES = 128  # of a sample: what that many tokens have room for
PARTS = ('vit', 'mlp1', 'mlp2', 'language')
MODELS_HELP = 'a published size (1B, 2B, 4B, 8B, 14B, 30B-A3B, 38B, 241B); default: all of them, or that of --model'


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train init``."""
    parser.add_argument('source', metavar='SRC', type=Path, help='a plain InternVL3.5 checkpoint')
    parser.add_argument('directory', metavar='DIR', type=Path, help='where to; an empty or new folder')
    parser.add_argument('--seed', type=int, default=0, help='of the new weights (default: 0)')


def add_consistency(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train consistency``."""
    _add_run(parser, batch=256, rate=4e-6, least_rate=1e-7, steps=2000)
    group = parser.add_argument_group('of consistency training')
    group.add_argument('--train', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART',
        help=f'what is trained after the warm-up: {", ".join(PARTS)} (default: all)',
    )  # fmt: skip
    group.add_argument('--lora-rank', type=int, default=0, metavar='R',
        help='train adapters of this rank instead of the weights of vit, mlp1 and language (and mlp2 itself); the '
        'reference is the same model without them, so that it takes no memory of its own (default: 0, none)',
    )  # fmt: skip
    group.add_argument('--warm-up-steps', type=int, default=200, help='of mlp2 alone (default: 200)')
    group.add_argument('--warm-up-rate', type=float, default=2e-4, help='learning rate of these (default: 2e-4)')


def add_router(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train router``."""
    _add_run(parser, batch=8, rate=1e-4, least_rate=1e-6, steps=5000)
    group = parser.add_argument_group('of router training')
    group.add_argument('--percentile', type=float, default=60, metavar='K',
        help='the share of tiles, in percent, whose ratio makes them compressible (default: 60, as in the paper)',
    )  # fmt: skip
    group.add_argument('--window', type=int, default=512, help='ratios that the percentile is taken of (default: 512)')
    group.add_argument('--epsilon', type=float, default=0.01, metavar='E',
        help='added to both losses of a ratio; the report says what others would change (default: 0.01)',
    )  # fmt: skip
    group.add_argument('--absolute-threshold', type=float, metavar='S',
        help='the score from which a tile is compressed (default: 0.5, or what --compress asks for)',
    )  # fmt: skip
    group.add_argument('--compress', type=float, metavar='SHARE',
        help='choose the absolute threshold so that this share of the held-out tiles is compressed',
    )  # fmt: skip
    group.add_argument('--relative-threshold', type=float, default=0.0, metavar='Q',
        help="compress only tiles above this quantile of their prompt's scores (default: 0)",
    )  # fmt: skip


def _add_run(parser: argparse.ArgumentParser, batch: int, rate: float, least_rate: float, steps: int) -> None:
    parser.add_argument('--model', type=Path, metavar='DIR', help='a ViCO checkpoint to begin with')
    parser.add_argument('--reference', type=Path, metavar='SRC', help='the plain checkpoint that it is made of')
    parser.add_argument('--data', type=Path, metavar='FILE', help='samples: .jsonl, or a meta .json')
    parser.add_argument('--held-out', type=Path, metavar='FILE', help='samples to judge by, not trained with')
    parser.add_argument('--output', type=Path, metavar='DIR', help="the run's folder; the checkpoint is written there")
    schedule = parser.add_argument_group('schedule')
    schedule.add_argument('--steps', type=int, default=steps, help=f'of the optimiser (default: {steps})')
    schedule.add_argument('--batch', type=int, default=batch, help=f'samples of a step (default: {batch})')
    schedule.add_argument('--rate', type=float, default=rate, help=f'learning rate at first (default: {rate:g})')
    schedule.add_argument('--least-rate', type=float, default=least_rate,
        help=f'learning rate at the end of the cosine (default: {least_rate:g})',
    )  # fmt: skip
    schedule.add_argument('--weight-decay', type=float, default=0.05, help="AdamW's (default: 0.05)")
    schedule.add_argument('--seed', type=int, default=0, help='of every draw (default: 0)')
    pace = parser.add_argument_group('pace and limits')
    pace.add_argument('--micro-batch', type=int, default=1, help='samples of a process at a time (default: 1)')
    pace.add_argument('--workers', type=int, default=2, help='processes that prepare samples, of each (default: 2)')
    pace.add_argument('--save-every', type=int, default=100, help='steps between kept states (default: 100)')
    pace.add_argument('--log-every', type=int, default=1, help='steps between lines of the log (default: 1)')
    pace.add_argument('--max-tiles', type=int, default=MAX_TILES, help=f'of a sample (default: {MAX_TILES})')
    pace.add_argument('--max-length', type=int, default=MAX_LENGTH,
        help=f'tokens of a sample, all tiles at 256 (default: {MAX_LENGTH})',
    )  # fmt: skip
    cost = parser.add_argument_group('cost')
    cost.add_argument('--dry-run', action='store_true',
        help='print parameters, memory per GPU, tokens and time, and train nothing; needs no checkpoint and no data',
    )  # fmt: skip
    cost.add_argument('--like', nargs='+', metavar='MODEL', help=f'with --dry-run: {MODELS_HELP}')
    cost.add_argument('--gpus', type=int, default=8, help='with --dry-run: their number (default: 8)')
    cost.add_argument('--tiles', type=int, default=10, help='with --dry-run: of a sample (default: 10)')
    cost.add_argument('--text', type=int, default=512, metavar='TOKENS',
        help='with --dry-run: of a sample, half of them of responses (default: 512)',
    )  # fmt: skip
    cost.add_argument('--tflops', type=float, default=300, metavar='N',
        help='with --dry-run: that a GPU does in a second, in bfloat16 (default: 300, of the 990 of an H100)',
    )  # fmt: skip
