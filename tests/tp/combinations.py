"""The tensor-parallel servers that are tried: every pair of two settings' values is in one of them."""

from dataclasses import dataclass, fields
from typing import Any

CHUNK = 512  # tokens of a chunk of a long prefill; a full tile has 256


@dataclass(frozen=True)
class Combination:
    """One server."""

    tp: int
    executor: str
    llm: str
    caching: bool
    block: int
    chunked: bool

    @property
    def kind(self) -> dict[str, Any]:
        """The tiny checkpoint, in float32: four ranks round bfloat16's sums to other near ties, and flip experts."""
        return {'llm': self.llm, 'dtype': 'float32'}

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of ``lmdeploy serve api_server``."""
        return (
            *('--tp', str(self.tp), '--distributed-executor-backend', self.executor),
            *('--cache-block-seq-len', str(self.block)),
            *(('--enable-prefix-caching',) if self.caching else ()),
            *(('--max-prefill-token-num', str(CHUNK)) if self.chunked else ()),
        )

    def __str__(self) -> str:
        extras = (*(('caching',) if self.caching else ()), *(('chunked',) if self.chunked else ()))
        return '-'.join((f'tp{self.tp}', self.executor, self.llm, f'block{self.block}', *extras))


# A covering array of strength two (Kleitman and Spencer, 1973): after the first row each column has another three of
# five rows set. Two such columns have a row in common, and each has one that the other lacks.
_SETTINGS = {
    'tp': ((2, 4), (1, 2, 3)),
    'executor': (('mp', 'ray'), (1, 4, 5)),
    'llm': (('dense', 'moe'), (2, 3, 4)),
    'caching': ((False, True), (2, 4, 5)),
    'block': ((64, 128), (1, 3, 5)),
    'chunked': ((False, True), (1, 2, 4)),
}
COMBINATIONS = tuple(
    Combination(**{name: values[row in rows] for name, (values, rows) in _SETTINGS.items()}) for row in range(6)
)


def pairs(combination: Combination) -> set[frozenset]:
    """Every two settings of a combination with their values."""
    settings = [(field.name, getattr(combination, field.name)) for field in fields(combination)]
    return {frozenset({one, other}) for one in settings for other in settings if one != other}


def all_pairs() -> set[frozenset]:
    """Every two values of different settings."""
    values = [(name, value) for name, (both, _) in _SETTINGS.items() for value in both]
    return {frozenset({one, other}) for one in values for other in values if one[0] != other[0]}
