"""What it costs to send a prompt's visual tokens on from the engine's process to a worker, as LMDeploy's executors do.

    tensors   LMDeploy's multimodal data holding a tensor for each span, as pickle takes them
    spans     the plugin's (lmdeploy_vico/adapter/engine/spans.py)
    pickle    as the mp executor does: one piece of bytes, here through a pipe, whose time does not count
    Ray       as the Ray executor does: put into the object store, taken out by an actor

send: in the engine's loop, until the value is pickled or in the store; receive: in the worker's loop, until there are
tensors; one copy: what the worker's process then takes to copy as many bytes as the tokens have. Before anything is
timed the worker compares the values once. Part of benchmarks/serving/handover.py.
"""

import logging
import multiprocessing
import pickle
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import ray
import torch
from lmdeploy.pytorch.multimodal.data_type import MultiModalData
from rich.console import Console
from rich.table import Table

from benchmarks.lib.timing import Meter
from benchmarks.serving.prompt_tokens import TOKENS as CASES
from benchmarks.serving.prompt_tokens import Copier, copy_milliseconds, cuts, embeddings
from lmdeploy_vico.adapter.engine.chat_model import MODALITY, SpanProcessor
from lmdeploy_vico.adapter.handover import PackedRows, Span, keep_freed_memory

TOKENS = CASES['ten tiles']
PHASES = ('send', 'receive')
Send = Callable[[list[MultiModalData], bool], dict[str, Any]]


def tensors(image: torch.Tensor) -> list[MultiModalData]:
    return [MultiModalData(image[start:end].clone(), start, end) for start, end in cuts(len(image))]


def spans(image: torch.Tensor) -> list[MultiModalData]:
    """As the engine's loop gets them."""
    sent = [Span(PackedRows.of(image[start:end]), start, end, content_hash='') for start, end in cuts(len(image))]
    multimodals = SpanProcessor().preprocess_input([], sent).input_multimodals
    assert multimodals is not None
    made: list[MultiModalData] = multimodals[MODALITY]
    return made


class Worker:
    """The receiving side: what taking a value took, and a copy of it, after comparing it if that is asked for."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.copier = Copier()

    def take(self, load: Callable[[], list[MultiModalData]], check: bool) -> dict[str, Any]:
        meter = Meter()
        value = load()
        used = meter()
        if check:
            got = torch.cat([span.data for span in value])
            assert torch.equal(got, embeddings(*got.shape)), 'the worker got other values'
        return {'receive': used, 'copy': self.copier(sum(span.data.nbytes for span in value))}

    def take_from_ray(self, held: list[Any], check: bool) -> dict[str, Any]:
        """The reference comes in a list, or Ray would take the value before this method begins."""
        return self.take(lambda: ray.get(held[0]), check)


def answer(orders: Connection) -> None:
    """A process that unpickles what it is sent, until that is None."""
    receiver = Worker()
    while (order := orders.recv()) is not None:
        data, check = order
        orders.send(receiver.take(lambda data=data: pickle.loads(data), check))  # type: ignore[misc]


def by_pickle(stack: ExitStack) -> Send:
    context = multiprocessing.get_context('spawn')  # a fork of this process would have its freed memory
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that a process that ends is noticed
    stack.callback(process.join)
    stack.callback(ours.send, None)

    def send(value: list[MultiModalData], check: bool) -> dict[str, Any]:
        meter = Meter()
        data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        sent = meter()
        ours.send((data, check))
        return {'send': sent, **ours.recv()}

    return send


def by_ray(stack: ExitStack) -> Send:
    ray.init(address='local', num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    stack.callback(ray.shutdown)
    receiver: Any = ray.remote(Worker).remote()

    def send(value: list[MultiModalData], check: bool) -> dict[str, Any]:
        meter = Meter()
        held = ray.put(value)
        sent = meter()
        taken: dict[str, Any] = ray.get(receiver.take_from_ray.remote([held], check))
        return {'send': sent, **taken}

    return send


def measure(widths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each width, form of the spans, and way to the worker."""
    keep_freed_memory()
    rows = []
    with ExitStack() as stack:
        senders = {'pickle': by_pickle(stack), 'Ray': by_ray(stack)}
        for width in widths:
            image = embeddings(TOKENS, width)
            values = {'tensors': tensors(image), 'spans': spans(image)}
            taken: dict[tuple[str, str], list[Any]] = {(way, form): [] for way in senders for form in values}
            for turn in range(3 + rounds):
                for way, form in taken:
                    used = senders[way](values[form], turn == 0)
                    taken[way, form] += [used] if turn > 2 else []  # first ones, for memory that is taken once
            rows += [{'width': width, 'executor': way, **row(form, times)} for (way, form), times in taken.items()]
    return rows


def row(form: str, times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def summary(unit: str, summarise: Callable[[list[float]], float]) -> dict[str, float]:
        return {phase: round(summarise([one[phase][unit] for one in times]) * 1e3, 2) for phase in PHASES}

    return {
        'form': form,
        'milliseconds': summary('clock', statistics.median),
        'processor_milliseconds': summary('processor', statistics.median),
        'least_processor_milliseconds': summary('processor', min),
        'copy_milliseconds': copy_milliseconds([one['copy'] for one in times]),
        'sent': len(times),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table('H', 'executor', 'form', *PHASES, 'computing', 'at least', 'one copy')
    table.title = 'Ten tiles from the engine to a worker: medians in milliseconds; processor time of send and receive'
    for one in rows:
        times = [f'{one["milliseconds"][phase]:.2f}' for phase in PHASES]
        computing = [
            ' + '.join(f'{one[unit][phase]:.2f}' for phase in PHASES)
            for unit in ('processor_milliseconds', 'least_processor_milliseconds')
        ]
        copy = f'{one["copy_milliseconds"]["median"]:.2f}'
        table.add_row(str(one['width']), one['executor'], one['form'], *times, *computing, copy)
    Console(width=140).print(table)
