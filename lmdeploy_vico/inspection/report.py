"""What is printed about routed pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmdeploy_vico.inspection.routed import Routed

if TYPE_CHECKING:
    from rich.table import Table


def as_table(routed: Sequence[Routed]) -> 'Table':
    """A line a picture: its tiles, those with 64 tokens, tokens with and without compression, the range of scores."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption='tiles: thumbnail included; score: 1 where compressing loses nothing')
    table.add_column('picture', overflow='fold')
    for column in ('size', 'grid', 'tiles', 'at 64', 'tokens', 'full', 'saved', 'scores'):
        table.add_column(column, justify='right', no_wrap=True)
    for one in routed:
        tokens = sum(one.tokens)
        table.add_row(
            escape(one.name),
            f'{one.image.width}x{one.image.height}',
            f'{one.grid.columns}x{one.grid.rows}',
            str(len(one.tokens)),
            str(sum(one.compressed)),
            str(tokens),
            str(one.full),
            f'{1 - tokens / one.full:.0%}',
            f'{min(one.scores):.2f} to {max(one.scores):.2f}',
        )
    return table


def summary(routed: Sequence[Routed]) -> str:
    """One sentence about all of them."""
    tokens, full = sum(sum(one.tokens) for one in routed), sum(one.full for one in routed)
    tiles, compressed = sum(len(one.tokens) for one in routed), sum(sum(one.compressed) for one in routed)
    pictures = '1 picture' if len(routed) == 1 else f'{len(routed)} pictures'
    return (
        f'{pictures}: {compressed} of {tiles} tiles get 64 tokens, {1 - tokens / full:.0%} of all visual tokens saved.'
    )
