"""How long a part of ``on-gpu`` may take on a GPU, by arithmetic that is printed, and how many requests fit its limit.

    python -m benchmarks budget llm-8B-64 soak --memory 139

A part is skipped where its model does not fit the device, and refused where too few requests fit.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gates.estimates import CLIENTS, MANY, Item
from benchmarks.gates.parts import Part, find
from benchmarks.share.model import rank_share
from lmdeploy_vico.checkpoints.random.published import MODELS, weight_bytes

LIMIT = 600  # seconds of a part
RESERVE = 60  # of them to start, to stop servers and to write what there is
FEWEST = 32  # requests of a cell that say anything
SPARE = 8.0  # GiB beside the weights for KV blocks, activations and the contexts of two processes
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What follows from the arithmetic of a part.

    Attributes:
        lines: the arithmetic, or why the part is not to be run.
        requests: of a cell; 0 where the part is not to be run.
        refused: whether that is because too few requests fit.
    """

    lines: list[str]
    requests: int = 0
    refused: bool = False


def plan(part: Part, limit: float, most: int, memory: float) -> Plan:
    """Work out how many requests of a cell fit.

    Args:
        limit: seconds of the part.
        most: requests of a cell.
        memory: of the device, in GiB.
    """
    if part.model is not None:
        held = MODELS[part.model] if part.tp == 1 else rank_share(MODELS[part.model], part.tp)
        weights = weight_bytes(held) / GIB
        if weights + SPARE > memory:
            needed = f'{weights + SPARE:.0f} GiB, {weights:.0f} of them for its weights'
            what = part.model if part.tp == 1 else f'The share of one of {part.tp} ranks of the {part.model}'
            reason = f'{what} needs {needed}; this device has {memory:.0f} GiB.'
            return Plan([f'==> {part.name}: SKIPPED. {reason}'])
    todo = part.items()
    number = requests(todo, limit, most)
    total = sum(item.seconds * (number if item.count is None else item.count) for item in todo)
    shown = list(lines(part.name, todo, number, limit))
    if total > limit - RESERVE or number < min(FEWEST, most):
        return Plan([*shown, f'==> {part.name}: REFUSED, there is too little time.'], refused=True)
    return Plan(shown, number)


def requests(todo: Sequence[Item], limit: float, most: int) -> int:
    """Return how many requests of a cell fit, in steps of the clients' number."""
    left = limit - RESERVE - sum(item.seconds * item.count for item in todo if item.count is not None)
    each = sum(item.seconds for item in todo if item.count is None)
    if not each:
        return most
    fit = int(left / each)
    return min(most, fit // CLIENTS * CLIENTS) if fit >= CLIENTS else max(0, min(most, fit))


def lines(name: str, todo: Sequence[Item], number: int, limit: float) -> Iterator[str]:
    """The arithmetic, for people."""
    total = 0.0
    for item in todo:
        count = number if item.count is None else item.count
        total += item.seconds * count
        yield f'    {count:7.0f} x {item.seconds:7.2f} s = {item.seconds * count:6.0f} s  {item.what}'
    yield f'==> {name}: at most {total:.0f} s by these estimates, {RESERVE} s in reserve, of {limit:.0f} s'


def main(argv: Sequence[str] | None = None) -> int:
    """Print the arithmetic of parts; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='+', metavar='PART', type=find)
    parser.add_argument('--most', type=int, default=MANY, help='requests of a cell (default: %(default)s)')
    parser.add_argument('--limit', type=float, default=LIMIT, help='seconds of a part (default: %(default)s)')
    parser.add_argument('--memory', type=float, default=float('inf'), metavar='GIB', help='of the device')
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        made = plan(part, arguments.limit, arguments.most, arguments.memory)
        print('\n'.join(made.lines))
        if made.requests:
            print(f'==> {part.name}: at most {made.requests} requests of a cell')
    return 0
