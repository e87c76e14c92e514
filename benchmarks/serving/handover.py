"""What it costs to hand a prompt's visual tokens to the engine's process, by the ways in which that can be done.

A prompt's visual tokens (bfloat16), cut into spans of 64 tokens, are sent between two processes as LMDeploy 0.18 sends
a request: pickled in the API process's event loop, over a ZMQ socket on localhost (TCP, DEALER to ROUTER), unpickled in
the engine's loop. Ways:

  tensors        a tensor for each span, as pickle takes it
  spans          a bytes object for each span, which becomes its tensor's memory
  ..., 32 MiB    the same where the C library has been led to keep freed blocks of up to 32 MiB
  ..., heap      the same where it keeps blocks of any size (lmdeploy_vico/adapter/handover.py)
  shared memory  a segment of /dev/shm for the image, copied and unlinked by the receiver
  CUDA IPC       tensors on the GPU whose handles are sent (needs CUDA)

prepare: in a thread beside the event loop; send: in the API process's loop, where nothing else runs meanwhile;
transport: until the engine has the message; receive: in the engine's loop, until there are tensors. The engine compares
the values once for each way before anything is timed.

Each way has two processes of its own, since what one leaves of memory makes the next faster or slower; they take turns.
Beside the time by the clock, which other programs on the machine lengthen, stands what the two loops' threads were
computing, and how often they had to wait for a page of memory. One copy: what the engine's process takes to copy as
many bytes as the tokens have, once a turn, when nothing else is to be received; the unit to read "receive" in.

Where several processes serve the model, the engine's loop then sends the tensors on to each:
benchmarks/serving/executors.py times that.

    python -m benchmarks handover --output results.json
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pickle
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler  # PyTorch has told it how to share tensors
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch
import zmq
from rich.console import Console
from rich.table import Table

from benchmarks.lib.facts import facts
from benchmarks.lib.timing import Meter
from benchmarks.serving.prompt_tokens import DTYPE, TOKENS, Copier, copy_milliseconds, cuts, embeddings
from lmdeploy_vico.adapter import handover
from lmdeploy_vico.adapter.handover import PackedRows

WIDTHS = (2048, 4096, 5120)  # of the published language models of 2B, 8B and 38B
IN_FLIGHT = (1, 8)  # requests sent at a time
PHASES = ('prepare', 'send', 'transport', 'receive')
LOOPS = ('send', 'receive')  # the phases in which an event loop does nothing else
TIMEOUT = 60_000  # ms without an answer


def leave_memory() -> None:
    """Let the C library do as it does."""


def keep_32_mib() -> None:
    """Free a block of the greatest size by which glibc raises the threshold from which it maps blocks by themselves."""
    bytes(32 * 2**20 - 2**16)


@dataclass(frozen=True)
class Way:
    """``prepare`` makes of an image's embeddings what is pickled; ``tensors`` makes the spans of what is unpickled."""

    prepare: Callable[[torch.Tensor], Any]
    tensors: Callable[[Any], list[torch.Tensor]]
    dumps: Callable[[Any], bytes] = pickle.dumps
    keep: Callable[[], None] = leave_memory

    def enter_process(self) -> None:
        """Have this process keep what is freed, or not."""
        self.keep()
        handover.keep_freed_memory = leave_memory  # type: ignore[assignment]


def spans(image: torch.Tensor) -> list[torch.Tensor]:
    return [image[start:end].clone() for start, end in cuts(len(image))]


def packed(image: torch.Tensor) -> list[PackedRows]:
    return [PackedRows.of(image[start:end]) for start, end in cuts(len(image))]


def unpacked(rows: Sequence[PackedRows]) -> list[torch.Tensor]:
    return [part.tensor() for part in rows]


def share(image: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    segment = SharedMemory(create=True, size=image.nbytes)
    torch.frombuffer(segment.buf, dtype=DTYPE, count=image.numel()).copy_(image.flatten())
    segment.close()
    return segment.name, tuple(image.shape)


def take(shared: tuple[str, tuple[int, int]]) -> list[torch.Tensor]:
    name, (tokens, width) = shared
    segment = SharedMemory(name)
    whole = torch.frombuffer(segment.buf, dtype=DTYPE, count=tokens * width).view(tokens, width)
    copies = spans(whole)
    del whole  # or the segment could not be closed
    segment.close()
    segment.unlink()
    return copies


def dump_handles(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def ways(cuda: bool | None = None) -> dict[str, Way]:
    """Return the ways by name; ``cuda``: with those of a GPU or without, by default as this machine has one."""
    made = {
        'tensors': Way(spans, list),
        'spans': Way(packed, unpacked),
        'spans, 32 MiB': Way(packed, unpacked, keep=keep_32_mib),
        'spans, heap': Way(packed, unpacked, keep=handover.keep_freed_memory),
        'shared memory': Way(share, take),
    }
    if torch.cuda.is_available() if cuda is None else cuda:
        made['CUDA IPC'] = Way(lambda image: image.cuda(), lambda whole: spans(whole), dump_handles)
    return made


def engine(name: str, ports: Connection) -> None:
    """The receiving process: answers each message with when it arrived and what it took until tensors were there."""
    way = ways()[name]
    way.enter_process()
    socket, copier = zmq.Context().socket(zmq.ROUTER), Copier()
    ports.send(socket.bind_to_random_port('tcp://localhost'))
    while True:
        client, data = socket.recv_multipart()
        arrived = time.perf_counter()  # the same clock in all processes
        meter = Meter()
        message = pickle.loads(data)
        if message is None:
            return
        value, check, last = message
        tensors = way.tensors(value)
        if name == 'CUDA IPC':
            torch.cuda.synchronize()
        used, right, copy = meter(), None, None
        if check:
            expected = embeddings(sum(map(len, tensors)), tensors[0].shape[1])
            right = torch.equal(torch.cat(tensors).cpu(), expected)
        if last:
            copy = copier(sum(tensor.nbytes for tensor in tensors))
        socket.send_multipart([client, pickle.dumps((arrived, used, right, copy))])


def api(name: str, port: int, orders: Connection) -> None:
    """The sending process: sends as many requests of a shape as it is told, and says what that took."""
    way = ways()[name]
    way.enter_process()
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT)
    socket.connect(f'tcp://localhost:{port}')
    while (order := orders.recv()) is not None:
        shape, number, check = order
        orders.send(send(socket, way, embeddings(*shape), number, check))
    socket.setsockopt(zmq.LINGER, TIMEOUT)
    socket.send(pickle.dumps(None))


def send(socket: Any, way: Way, image: torch.Tensor, number: int, check: bool) -> list[dict[str, Any]]:
    """Send requests without waiting for answers in between; what each phase used, for each request."""
    took, sent = [], []
    for left in reversed(range(number)):
        meter = Meter()
        value = way.prepare(image)
        prepare = meter()
        message = way.dumps((value, check, not left))
        size = len(message)
        socket.send(message)
        sent.append(time.perf_counter())
        took.append({'prepare': prepare, 'send': meter(), 'message_bytes': size})
        del value, message
    for phases, end in zip(took, sent, strict=True):
        arrived, used, right, copy = pickle.loads(socket.recv())
        assert right is not False, 'the engine got other values'
        phases |= {'transport': {'clock': max(0.0, arrived - end)}, 'receive': used, 'copy': copy}
    return took


class Pair:
    """The two processes of one way."""

    def __init__(self, name: str, context: Any) -> None:
        ports, theirs = context.Pipe()
        self._orders, taken = context.Pipe()
        self._engine = context.Process(target=engine, args=(name, theirs), daemon=True)
        self._engine.start()
        self._api = context.Process(target=api, args=(name, ports.recv(), taken), daemon=True)
        self._api.start()
        taken.close()  # so that a process that ends is noticed

    def send(self, shape: tuple[int, int], number: int, check: bool = False) -> list[dict[str, Any]]:
        self._orders.send((shape, number, check))
        answer: list[dict[str, Any]] = self._orders.recv()
        return answer

    def stop(self) -> None:
        self._orders.send(None)
        for process in (self._api, self._engine):
            process.join(10)
            process.kill()
            process.join()


def turns(rounds: int, number: int) -> int:
    """How often so many requests are sent at a time, with a first time for memory that is taken once."""
    return 1 + max(3, rounds // number)


def measure(case: str, width: int, rounds: int, in_flight: Sequence[int]) -> list[dict[str, Any]]:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['benchmarks.serving.prompt_tokens', 'zmq'])  # so that its children have torch
    pairs = {name: Pair(name, context) for name in ways()}
    shape, rows = (TOKENS[case], width), []
    for pair in pairs.values():
        pair.send(shape, 1, check=True)
    for number in in_flight:
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in pairs}
        for turn in range(turns(rounds, number)):
            for name, pair in pairs.items():
                times = pair.send(shape, number)
                taken[name] += times if turn else []
        rows += [{'case': case, 'width': width, 'in_flight': number, **row(name, taken[name])} for name in pairs]
    for pair in pairs.values():
        pair.stop()
    return rows


def row(name: str, times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def median(phase: str, unit: str) -> float:
        return statistics.median(one[phase][unit] for one in times)

    return {
        'way': name,
        'milliseconds': {phase: round(median(phase, 'clock') * 1e3, 2) for phase in PHASES},
        'processor_milliseconds': {phase: round(median(phase, 'processor') * 1e3, 2) for phase in LOOPS},
        'least_processor_milliseconds': {
            phase: round(min(one[phase]['processor'] for one in times) * 1e3, 2) for phase in LOOPS
        },
        'copy_milliseconds': copy_milliseconds([one['copy'] for one in times if one['copy'] is not None]),
        'page_faults': {phase: round(median(phase, 'faults')) for phase in LOOPS},
        'requests': len(times),
        'message_bytes': times[0]['message_bytes'],
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table('case', 'H', 'in flight', 'way', *PHASES, 'computing', 'one copy', 'page faults')
    table.title = 'Medians in milliseconds for one request; computing: processor time of send and receive'
    for one in rows:
        place = [one['case'], str(one['width']), str(one['in_flight']), one['way']]
        times = [f'{one["milliseconds"][phase]:.2f}' for phase in PHASES]
        computing = ' + '.join(f'{one["processor_milliseconds"][phase]:.2f}' for phase in LOOPS)
        faults = ' + '.join(str(one['page_faults'][phase]) for phase in LOOPS)
        table.add_row(*place, *times, computing, f'{one["copy_milliseconds"]["median"]:.2f}', faults)
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=100, help='requests for each way and number in flight')
    parser.add_argument('--in-flight', type=int, nargs='+', default=list(IN_FLIGHT), help='requests sent at a time')
    parser.add_argument('--widths', type=int, nargs='+', default=list(WIDTHS), help='widths of the language model')
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    from benchmarks.serving import executors  # with LMDeploy, which the processes of the ways do without

    load = os.getloadavg()[:1]  # before, to tell what other programs did from what this one did
    tables: dict[str, list[dict[str, Any]]] = {'workers': executors.measure(arguments.widths, arguments.rounds)}
    executors.show(tables['workers'])
    tables['engine'] = []
    for width, case in itertools.product(arguments.widths, TOKENS):
        tables['engine'] += measure(case, width, arguments.rounds, arguments.in_flight)
        if arguments.output:  # each time, for a run that is cut off
            about = {'facts': facts(), 'dtype': str(DTYPE), 'load_average': [*load, *os.getloadavg()[:1]]}
            write(arguments.output, about, tables)
    show(tables['engine'])
    return 0


def write(path: Path, about: dict[str, Any], tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write JSON with a line for each row, which diffs can show."""
    parts = [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in about.items()]
    for key, rows in tables.items():
        lines = ',\n  '.join(json.dumps(one) for one in rows)
        parts.append(f'{json.dumps(key)}: [\n  {lines}\n ]')
    path.write_text('{\n ' + ',\n '.join(parts) + '\n}\n')
