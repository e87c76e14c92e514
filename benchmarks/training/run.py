"""Consistency and router training of a tiny plain checkpoint with photographs, through ``lmdeploy-vico train``.

    python -m benchmarks training

The model is random and its answers mean nothing; what is measured is whether it goes on saying, with fewer visual
tokens, what the plain checkpoint says (Eq. 1 of the paper), on parts of the pictures that it was not trained with.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from benchmarks.lib.facts import facts
from benchmarks.training.data import write
from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.cli import main as lmdeploy_vico

RESULTS = Path(__file__).parents[1] / 'results' / 'training-cpu.json'


def main(argv: Sequence[str]) -> int:
    """Run both stages, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output-file', type=Path, default=RESULTS, help=f'(default: {RESULTS.name}; and a .png)')
    parser.add_argument('--crops', type=int, default=12, help='of each of six pictures (default: 12)')
    parser.add_argument('--warm-up-steps', type=int, default=50, help='of mlp2 alone (default: 50)')
    parser.add_argument('--steps', type=int, default=70, help='of consistency training (default: 70)')
    parser.add_argument('--router-steps', type=int, default=24, help='of router training (default: 24)')
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments)
    arguments.output_file.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    draw(results, arguments.output_file.with_suffix('.png'))
    print(json.dumps(results))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.time()
    plain = make_tiny_checkpoint(folder / 'plain', flash=False, dtype='float32')
    data, held_out = write(folder, arguments.crops, seed=0)
    start, vico, flash = folder / 'start', folder / 'vico', folder / 'flash'
    common = ['--reference', plain, '--data', data, '--held-out', held_out, '--workers', 0]
    consistency = {
        '--steps': arguments.steps,
        '--warm-up-steps': arguments.warm_up_steps,
        '--batch': 4,
        '--rate': 1e-4,
        '--least-rate': 1e-5,
        '--warm-up-rate': 3e-3,
    }
    router = {'--steps': arguments.router_steps, '--batch': 8, '--rate': 1e-3, '--compress': 0.6}
    _train('init', plain, start)
    _train('consistency', '--model', start, '--output', vico, *common, *_words(consistency))
    _train('router', '--model', vico, '--output', flash, *common, *_words(router))
    return {
        'conditions': {
            **facts(),
            'transformers': transformers.__version__,
            'checkpoint': 'lmdeploy-vico tiny --plain --dtype float32',
            'samples': [len(path.read_text().splitlines()) for path in (data, held_out)],
            'consistency': consistency,
            'router': router,
            'seconds': round(time.time() - began),
        },
        'divergence': json.loads((vico / 'report.json').read_text()),
        'log': [json.loads(line) for line in (vico / 'log.jsonl').read_text().splitlines()],
        'router': json.loads((flash / 'report.json').read_text()),
    }


def _words(options: dict[str, Any]) -> list[Any]:
    return [word for pair in options.items() for word in pair]


def _train(*words: Any) -> None:
    status = lmdeploy_vico(['train', *map(str, words)])
    if status:
        raise SystemExit(status)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use('agg')
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for when, values in results['divergence'].items():
        left.plot([100 * float(share) for share in values], list(values.values()), marker='o', label=f'{when} training')
    left.set(xlabel='compressed tiles, %', ylabel='KL (reference || policy), nats a token', title='Held-out samples')
    left.legend()
    offset = 0
    for phase in ('warm-up', 'main'):
        losses = [entry['loss'] for entry in results['log'] if entry['phase'] == phase]
        label = 'mlp2 alone, all tiles compressed' if phase == 'warm-up' else 'everything, a random share compressed'
        right.plot(range(offset + 1, offset + len(losses) + 1), losses, label=label)
        offset += len(losses)
    right.set(xlabel='step', ylabel='loss (Eq. 1)', title='Training', yscale='log')
    right.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
