"""What it costs to give a prompt's visual tokens from the engine's process to tensor-parallel ranks.

    LMDeploy   a tensor for each span, sent in the engine's loop
    plugin     its spans (lmdeploy_vico/adapter/engine/spans.py), sent beside the loop
    mp         LMDeploy's ring of shared memory to processes, as its executor uses it
    Ray        its object store and a call of an actor for each rank

stands: the longest time for which the engine's loop served nobody else, until the message was sent; last: from then on
until the last rank has tensors; first: the first one. One prompt of ten tiles, uncompressed, at a time; LMDeploy and
plugin take turns. Each rank compares the values once, before anything is timed. With fewer cores than ranks these take
turns too, and "last" is mostly that.

    python -m benchmarks ranks --output results.json
"""

import argparse
import asyncio
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from lmdeploy.pytorch.engine.executor.mp_executor import Notifier, SharedBuffer
from lmdeploy.pytorch.model_inputs import VisionModelInputs
from lmdeploy.pytorch.multimodal.data_type import MultiModalData
from rich.console import Console
from rich.table import Table

from benchmarks.lib.facts import facts
from benchmarks.serving.executors import TOKENS, spans, tensors
from benchmarks.serving.handover import WIDTHS, write
from benchmarks.serving.prompt_tokens import DTYPE, embeddings
from lmdeploy_vico.adapter.engine.ring import call_ranks, know_rings
from lmdeploy_vico.adapter.engine.spans import beside_the_loop
from lmdeploy_vico.adapter.handover import keep_freed_memory

RANKS = (2, 8)
TICK = 2e-4  # seconds between two looks at the loop's clock
WARM = 2  # rounds in which memory is taken for the first time
FORMS: dict[str, Callable[[torch.Tensor], list[MultiModalData]]] = {'LMDeploy': tensors, 'plugin': spans}
ALL = 0xFF  # mask of the ranks that a message is for
Arrivals = Callable[[], Awaitable[list[float]]]  # by the clock, which all processes of a machine have in common
Send = Callable[[str, dict[str, Any]], Awaitable[Arrivals]]


def step(image: torch.Tensor, form: str) -> dict[str, Any]:
    """What LMDeploy's engine gives to an executor: by name, the step's inputs among it."""
    vision = VisionModelInputs(input_multimodals=[{'image': FORMS[form](image)}])
    return {'inputs': SimpleNamespace(vision_inputs=vision)}


def check(inputs: dict[str, Any]) -> None:
    """Compare what a rank has received with what was sent."""
    got = torch.cat([span.data for span in inputs['inputs'].vision_inputs.input_multimodals[0]['image']])
    assert torch.equal(got, embeddings(*got.shape)), 'a rank got other values'


# --- mp --------------------------------------------------------------------------------------------------------------


def serve_rank(rank: int, notifiers: dict[str, Notifier], names: dict[str, str], answers: Connection) -> None:
    """A rank's process: takes a message from each form's ring in turn, and says when it had it, until one is empty."""
    keep_freed_memory()
    know_rings(names['plugin'])
    rings = {form: SharedBuffer(rank, notifiers[form], name) for form, name in names.items()}

    async def serve() -> None:
        first = True
        while True:
            for form in FORMS:
                message = await rings[form].receive_async()
                if not message['args']:
                    return
                answers.send(time.perf_counter())
                if first:
                    check(message['args'][0])
            first = False

    asyncio.run(serve())


class Executor:
    """As much of LMDeploy's as sends."""

    def __init__(self, ring: SharedBuffer) -> None:
        self.comm_buf = ring


def by_mp(stack: ExitStack, ranks: int) -> Send:
    context = multiprocessing.get_context('spawn')
    notifiers = {form: Notifier(ranks, context) for form in FORMS}
    rings = {form: SharedBuffer(-1, notifiers[form]) for form in FORMS}
    names = {form: ring.name() for form, ring in rings.items()}
    know_rings(names['plugin'])
    pipes = [context.Pipe() for _ in range(ranks)]
    for rank, (_, theirs) in enumerate(pipes):
        process = context.Process(target=serve_rank, args=(rank, notifiers, names, theirs), daemon=True)
        process.start()
        stack.callback(process.join)
        theirs.close()  # so that a process that ends is noticed
    executor = Executor(rings['plugin'])
    stack.callback(rings['LMDeploy'].send, {'args': ()})  # before the processes are waited for

    async def send(form: str, inputs: dict[str, Any]) -> Arrivals:
        message = {'method': 'forward_async', 'args': (inputs,), 'kwargs': {}, 'return_mask': 0}
        if form == 'plugin':
            await call_ranks(executor, message, ALL)
        else:
            rings[form].send(message)
        return lambda: asyncio.to_thread(lambda: [ours.recv() for ours, _ in pipes])

    return send


# --- Ray -------------------------------------------------------------------------------------------------------------


class Actor:
    """A rank."""

    def __init__(self) -> None:
        keep_freed_memory()

    async def take(self, inputs: dict[str, Any], first: bool) -> float:
        """When the inputs were there, by the clock."""
        arrived = time.perf_counter()
        if first:
            check(inputs)
        return arrived


def by_ray(stack: ExitStack, ranks: int) -> Send:
    ray.init(address='local', num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    stack.callback(ray.shutdown)
    actors: list[Any] = [ray.remote(Actor).options(num_cpus=0).remote() for _ in range(ranks)]
    checked: set[str] = set()

    async def send(form: str, inputs: dict[str, Any]) -> Arrivals:
        async def put_and_call() -> list[Any]:
            held = ray.put(inputs)
            return [actor.take.remote(held, form not in checked) for actor in actors]

        called = put_and_call()
        answers = await (beside_the_loop(called) if form == 'plugin' else called)
        checked.add(form)

        async def arrivals() -> list[float]:
            return list(await asyncio.gather(*answers))

        return arrivals

    return send


# --- measuring -------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[ExitStack, int], Send]] = {'mp': by_mp, 'Ray': by_ray}


class Loop:
    """Notes for how long the running loop serves nobody."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._ticking = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last - TICK), now

    async def stop(self) -> float:
        """Seconds of the longest time."""
        await asyncio.sleep(2 * TICK)  # what has just ended counts
        self._ticking.cancel()
        return self.longest


async def once(send: Send, form: str, inputs: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of one message."""
    loop = Loop()
    await asyncio.sleep(2 * TICK)
    begin = time.perf_counter()
    arrivals = await send(form, inputs)
    stands = await loop.stop()
    arrived = await arrivals()
    return {
        'stands': stands * 1e3,
        'first': (min(arrived) - begin) * 1e3,
        'last': (max(arrived) - begin) * 1e3,
    }


async def measure(send: Send, width: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """For each form, what each message took after the first ones; forms take turns."""
    image = embeddings(TOKENS, width)
    steps = {form: step(image, form) for form in FORMS}
    taken: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for turn in range(WARM + rounds):
        for form in FORMS:
            took = await once(send, form, steps[form])
            taken[form] += [took] if turn >= WARM else []
    return taken


def row(times: Sequence[dict[str, float]]) -> dict[str, Any]:
    def summary(summarise: Callable[[list[float]], float]) -> dict[str, float]:
        return {key: round(summarise([one[key] for one in times]), 2) for key in times[0]}

    return {'milliseconds': summary(statistics.median), 'least_milliseconds': summary(min), 'messages': len(times)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table('executor', 'ranks', 'H', 'by', 'stands', 'first', 'last', 'at least')
    table.title = 'Ten tiles from the engine to its ranks: medians in milliseconds'
    for one in rows:
        times = [f'{one["milliseconds"][key]:.1f}' for key in ('stands', 'first', 'last')]
        least = ' / '.join(f'{one["least_milliseconds"][key]:.1f}' for key in ('stands', 'first', 'last'))
        table.add_row(one['executor'], str(one['ranks']), str(one['width']), one['by'], *times, least)
    Console(width=120).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30, help='messages for each form')
    parser.add_argument('--ranks', type=int, nargs='+', default=list(RANKS), help='numbers of ranks')
    parser.add_argument('--widths', type=int, nargs='+', default=list(WIDTHS), help='widths of the language model')
    parser.add_argument('--executors', nargs='+', choices=WAYS, default=list(WAYS), help='ways to send')
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    rows, load = [], os.getloadavg()[:1]
    for executor in arguments.executors:
        for ranks in arguments.ranks:
            with ExitStack() as stack:
                send = WAYS[executor](stack, ranks)
                for width in arguments.widths:
                    taken = asyncio.run(measure(send, width, arguments.rounds))
                    about = {'executor': executor, 'ranks': ranks, 'width': width}
                    rows += [{**about, 'by': form, **row(times)} for form, times in taken.items()]
                    print(f'{executor}, {ranks} ranks, H = {width}: done', flush=True)
    show(rows)
    if arguments.output:
        facts_of_run = {'facts': facts(), 'dtype': str(DTYPE), 'load_average': [*load, *os.getloadavg()[:1]]}
        write(arguments.output, facts_of_run, {'rows': rows})
    return 0
