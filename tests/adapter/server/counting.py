"""A request that is being prepared, as far as the memory for its pictures goes."""

from collections.abc import Iterator
from contextlib import contextmanager

from lmdeploy_vico.adapter.server.served import PixelBudget, PixelShare, ServedRequest, serving


@contextmanager
def counting(budget: PixelBudget) -> Iterator[PixelShare]:
    """Count what is decoded inside as one request's part of the budget."""
    share = PixelShare(budget)
    with serving(ServedRequest(pixels=share)), share.in_use():
        yield share
