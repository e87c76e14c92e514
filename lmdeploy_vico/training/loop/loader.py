"""Samples, read and cut in the order of a run by processes of their own."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from lmdeploy_vico.training import TrainingError


class Items(Protocol):
    """What is prepared, by number."""

    def __getitem__(self, number: int, /) -> Any: ...


def prepared(items: Items, order: Sequence[int], at_a_time: int, workers: int) -> Iterator[list[Any]]:
    """Items in this order.

    Args:
        items: by number.
        order: the numbers that are wanted.
        at_a_time: how many there are in each list.
        workers: processes that prepare them ahead; 0 for none but this one.

    Raises:
        TrainingError: as the items do.
    """
    loader = DataLoader(_Sentences(items), at_a_time, sampler=order, num_workers=workers, collate_fn=list)
    for batch in loader:
        for item in batch:
            if isinstance(item, TrainingError):
                raise item
        yield batch


class _Sentences(Dataset):
    """Hands errors on as they are: what a worker process raises would come with its whole traceback as its text."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __getitem__(self, number: int) -> Any:
        try:
            return self._items[number]
        except TrainingError as error:
            return error
