"""Estimates of several models as a table."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from lmdeploy_vico.training.cost.estimate import ASSUMPTIONS, Estimate, Workload
from lmdeploy_vico.training.cost.shapes import Shapes

GIB = 2**30
COLUMNS = (
    'model',
    'parameters',
    'trained',
    'FSDP units',
    'largest',
    'GiB per GPU',
    'tokens a step',
    's a step',
    'hours',
)


def show(title: str, rows: Mapping[str, tuple[Shapes, Estimate]], work: Workload, console: Console) -> None:
    """Print a line for each model, what its memory is made of, and by what model it is estimated."""
    table = Table(*COLUMNS, title=title)
    for name, (shapes, cost) in rows.items():
        table.add_row(
            name,
            _billions(shapes.total),
            _billions(cost.trained),
            str(len(shapes.units)),
            _billions(shapes.largest_unit),
            f'{cost.memory / GIB:.1f} ({cost.states / GIB:.1f} + {cost.gathered / GIB:.1f} + '
            f'{cost.activations / GIB:.1f})',
            f'{cost.tokens / 1e6:.2f} M',
            f'{cost.seconds:.1f}',
            f'{cost.hours:.1f}',
        )
    console.print(table)
    console.print(
        f'{work.gpus} GPUs of {work.flops / 1e12:g} TFLOP/s; {work.warm_up + work.steps} steps of {work.batch} samples '
        f'of {work.tiles} tiles and {work.text} tokens of text. GiB: states + gathered + activations.'
    )
    console.print(ASSUMPTIONS, end='')


def _billions(count: int) -> str:
    return f'{count / 1e9:.2f} B' if count >= 1e9 else f'{count / 1e6:.0f} M'
