"""The tables of docs/reader.md, from the committed results.

python -m benchmarks.reader.report
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.reader.run import RESULTS

WAYS = ('none', 'auto', 'all')
TITLES = {
    'one tile': 'Pictures of one tile',
    'several tiles': 'Pictures of three and five tiles (Table 1)',
    'several pictures': 'Two and three pictures (Table 2)',
}
ABLATION = {
    'none': 'nothing compressed',
    'auto': 'the router',
    'random': 'as many tiles of each prompt, by lot',
    'image': 'whole images, by their mean score',
    'all': 'everything compressed',
    'vanilla, none': 'before consistency training: nothing compressed',
    'vanilla, auto': 'before consistency training: the same router',
    'vanilla, all': 'before consistency training: everything compressed',
}


def markdown(results: Mapping[str, Any]) -> str:
    """All tables: right answers in percent, with 95 % intervals over pictures."""
    parts = [_table(title, results['tables'][name]) for name, title in TITLES.items()]
    return '\n\n'.join([*parts, _ablation(results['ablation']), _divergence(results['divergence'])])


def _table(title: str, kinds: Mapping[str, Any]) -> str:
    head = [title, 'questions', *(f'right at `{way}`' for way in WAYS)]
    head += ['points lost at `all`', 'retained at `auto`', 'tiles at 64 at `auto`']
    rows = [
        [
            kind,
            str(lines['none']['questions']),
            *(_interval(lines[way]['right']) for way in WAYS),
            _interval(lines['all']['lost points']),
            _interval(lines['auto']['retained']),
            f'{lines["auto"]["compressed tiles"]:.0f} %',
        ]
        for kind, lines in kinds.items()
    ]
    return '\n'.join(_lines(head, rows))


def _ablation(ablation: Mapping[str, Any]) -> str:
    differences = ablation['differences in points']
    head = ['Pictures of three and five tiles (Table 3)', 'right', 'tiles at 64', 'the router is better by, points']
    rows = [
        [
            text,
            _interval(ablation['lines'][way]['right']),
            f'{ablation["lines"][way]["compressed tiles"]:.0f} %',
            _interval(differences[f'auto - {way}']) if f'auto - {way}' in differences else '',
        ]
        for way, text in ABLATION.items()
    ]
    return '\n'.join(_lines(head, rows))


def _divergence(divergence: Mapping[str, Any]) -> str:
    shares = list(divergence['before'])
    head = [
        'KL (reference \\|\\| policy), nats a token, at so many compressed tiles',
        *(f'{float(one):.0%}' for one in shares),
    ]
    rows = [
        [f'{when} consistency training', *(f'{values[one]:.3f}' for one in shares)]
        for when, values in divergence.items()
    ]
    return '\n'.join(_lines(head, rows))


def _interval(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f'{value:.1f} ({low:.1f} to {high:.1f})'


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f'| {" | ".join(head)} |'
    yield '|---' + '|---:' * (len(head) - 1) + '|'
    for row in rows:
        yield f'| {" | ".join(row)} |'


if __name__ == '__main__':
    print(markdown(json.loads(RESULTS.read_text(encoding='utf-8'))))
