"""Measures the share that one tensor-parallel rank has of a language model, on a single GPU, by token compression.

A checkpoint with the shapes of that share, of all layers unless --layers says otherwise, is served by LMDeploy's own
engine with random weights that are made up on the device. Its kernels, its scheduler and its paged attention do what
they would do on each of --tp GPUs, but for the all-reduces: how long those take is the planner's model, shown apart.

    python -m benchmarks share --like 241B --tp 8 --output share.json
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.lib.facts import facts
from benchmarks.share.model import TINY, rank_share, whole
from benchmarks.share.report import NATURE, Split, gpu_of_device, rows, said, table
from benchmarks.share.turns import ROUNDS, STEPS, TEXTS, filling, kinds
from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.report.paper import SHARES, TILES
from lmdeploy_vico.bench.report.results import OutputFile
from lmdeploy_vico.checkpoints.random.published import make_checkpoint_without_weights, weight_bytes
from lmdeploy_vico.checkpoints.sizes import MODELS, Model

if TYPE_CHECKING:
    from benchmarks.share.prefills import Cell


def measure(share: Model, arguments: argparse.Namespace, save: Callable[[Sequence['Cell']], None]) -> None:
    """Serve a checkpoint of these dimensions in this process; ``save`` is called with the cells after each round."""
    from benchmarks.share import prefills  # takes seconds, and the device
    from lmdeploy_vico.adapter.server.synthetic import SyntheticEncoder

    works = kinds(arguments.tiles, arguments.text_tokens, arguments.token_compression)
    with tempfile.TemporaryDirectory(prefix='vico-share-') as folder:
        checkpoint = make_checkpoint_without_weights(Path(folder), share)
        engine = prefills.Prefills(checkpoint, max(filling(work, arguments.steps) for work in works))
    encoder = SyntheticEncoder(share.size.hidden, engine.dtype, arguments.tiles)
    cells = [prefills.make_cell(work, arguments.steps, encoder, share.vocab_size) for work in works]
    asyncio.run(prefills.measure(engine, cells, arguments.rounds, lambda number: save(cells)))


def content(split: Split, share: Model, arguments: argparse.Namespace, made: Sequence[Any]) -> dict[str, Any]:
    """What the results' file says."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return {
        'benchmark': 'share',
        'nature': NATURE,
        'complete': bool(made) and all(row['measured']['rounds'] == arguments.rounds for row in made),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'facts': facts(),
        'arguments': given,
        'model': split.like,
        'tp': split.tp,
        'layers': split.layers,
        'all_layers': split.model.size.layers,
        'modelled_gpu': split.gpu.name,
        'share': asdict(share.size),
        'share_bytes': weight_bytes(share),
        'cells': list(made),
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--like', choices=(TINY, *MODELS), default='241B', help='the whole model (default: 241B)')
    made.add_argument('--tp', type=int, default=8, metavar='N', help='ranks that share it (default: 8)')
    made.add_argument(
        '--layers', type=int, metavar='N', help='of the share, if not all fit; times are scaled to all of them then'
    )
    made.add_argument('--tiles', type=int, default=TILES, help='(default: %(default)s)')
    made.add_argument('--text-tokens', type=int, nargs='+', default=list(TEXTS), help='(default: 64 512)')
    made.add_argument(
        '--token-compression', type=float, nargs='+', default=[0.0, *SHARES], metavar='SHARE', help='(0 0.25 0.5 0.75)'
    )
    made.add_argument('--rounds', type=int, default=ROUNDS, help='turns of each cell (default: %(default)s)')
    made.add_argument('--steps', type=int, default=STEPS, help='that a turn fills (default: %(default)s)')
    made.add_argument('--output', type=Path, required=True, help='results as JSON, written again after every round')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    arguments = options.parse_args(argv)
    model = whole(arguments.like)
    try:
        share = rank_share(model, arguments.tp, arguments.layers)
    except ValueError as error:
        options.error(f'{error}.')
    output, console = OutputFile(arguments.output), Console(width=150)
    gpu = gpu_of_device(facts()['device'])
    split = Split(arguments.like, model, arguments.tp, share.size.layers, gpu)
    made: list[dict[str, Any]] = []

    def save(cells: Sequence['Cell']) -> None:
        made[:] = rows(split, cells)
        if made:
            output.write(content(split, share, arguments, made))

    status = 0
    try:
        output.check()
        measure(share, arguments, save)
    except (BenchError, RuntimeError, KeyboardInterrupt) as error:
        print(f'share: {error or "ended before all was measured"}', file=sys.stderr)
        status = 1
    if made:  # what there is, also of a run that has not come to its end
        console.print(table(split, made))
        console.print(said(split, made))
    return status
