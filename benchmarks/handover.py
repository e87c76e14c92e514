"""What it costs to hand a prompt's visual tokens to the engine's process, by the ways in which that can be done.

A prompt of ten tiles at the 8B model's width (H = 4096, bfloat16), cut into spans of 64 tokens, is sent between two
processes as LMDeploy 0.18 sends a request: pickled in the API process's event loop, over a ZMQ socket on localhost
(TCP, DEALER to ROUTER), unpickled in the engine's loop. Ways:

  tensors        a tensor for each span, as pickle takes it
  one buffer     bytes of the whole image, once, and each span's place in it
  pieces         the same in pieces of 1 MiB, of two spans
  spans          a bytes object for each span, which becomes its tensor's memory
  ..., kept      the same where the C library keeps what is freed (spans, kept: lmdeploy_vico/adapter/handover.py)
  shared memory  a segment of /dev/shm for the image, copied and unlinked by the receiver
  CUDA IPC       tensors on the GPU whose handles are sent (needs CUDA)

prepare: in a thread beside the event loop; send: in the API process's loop, where nothing else runs meanwhile;
transport: until the engine has the message; receive: in the engine's loop, until there are tensors. The engine compares
the values once for each way before anything is timed.

Each way has two processes of its own, since what one leaves of memory makes the next faster or slower; they take turns.
Beside the time by the clock, which other programs on the machine lengthen, stands what the two loops' threads were
computing, and how often they had to wait for a page of memory.

    python -m benchmarks.handover --output results.json
"""

import argparse
import json
import multiprocessing
import pickle
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch
import zmq
from rich.console import Console
from rich.table import Table

from benchmarks.facts import facts
from lmdeploy_vico.adapter import handover
from lmdeploy_vico.adapter.handover import PackedRows

WIDTH, DTYPE = 4096, torch.bfloat16
BLOCK = 64  # tokens of a KV block
PIECE = 2  # spans, of half a MiB each
TOKENS = {'uncompressed': 2560, '75 % compressed': 1120}  # of ten tiles; round half up of 7.5 are 8: 8 * 64 + 2 * 256
PHASES = ('prepare', 'send', 'transport', 'receive')
LOOPS = ('send', 'receive')  # the phases in which an event loop does nothing else
TIMEOUT = 60_000  # ms without an answer


def embeddings(tokens: int) -> torch.Tensor:
    """The same on both sides."""
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(DTYPE)


def cuts(tokens: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *range(BLOCK, tokens, BLOCK), tokens]))


@dataclass(frozen=True)
class Way:
    """``prepare`` makes of an image's embeddings what is pickled; ``tensors`` makes the spans of what is unpickled."""

    prepare: Callable[[torch.Tensor], Any]
    tensors: Callable[[Any], list[torch.Tensor]]
    dumps: Callable[[Any], bytes] = pickle.dumps
    kept: bool = False

    def enter_process(self) -> None:
        """Have this process keep what is freed, or not."""
        if self.kept:
            handover.keep_freed_memory()
        else:
            handover.keep_freed_memory = lambda: None  # type: ignore[assignment]


def spans(image: torch.Tensor) -> list[torch.Tensor]:
    return [image[low:high].clone() for low, high in cuts(len(image))]


def packed(image: torch.Tensor) -> list[PackedRows]:
    return [PackedRows.of(image[low:high]) for low, high in cuts(len(image))]


def unpacked(rows: Sequence[PackedRows]) -> list[torch.Tensor]:
    return [part.tensor() for part in rows]


@dataclass(frozen=True)
class Part:
    """A span's bytes ``[first, last)`` in a buffer that it shares with others, which pickle writes once."""

    buffer: bytes
    first: int
    last: int

    def tensor(self) -> torch.Tensor:
        copy = bytearray(memoryview(self.buffer)[self.first : self.last])
        return torch.frombuffer(copy, dtype=DTYPE).view(-1, WIDTH)


def parts(image: torch.Tensor, number: int | None = None) -> list[Part]:
    """Buffers of so many spans each; of all of them by default."""
    places, row = cuts(len(image)), WIDTH * DTYPE.itemsize
    made = []
    for start in range(0, len(places), number or len(places)):
        several = places[start : start + (number or len(places))]
        begin, end = several[0][0], several[-1][1]
        buffer = PackedRows.of(image[begin:end]).data
        made += [Part(buffer, (low - begin) * row, (high - begin) * row) for low, high in several]
    return made


def pieces(image: torch.Tensor) -> list[Part]:
    return parts(image, PIECE)


def copied(made: Sequence[Part]) -> list[torch.Tensor]:
    return [part.tensor() for part in made]


def share(image: torch.Tensor) -> tuple[str, int]:
    segment = SharedMemory(create=True, size=image.nbytes)
    torch.frombuffer(segment.buf, dtype=DTYPE, count=image.numel()).copy_(image.flatten())
    segment.close()
    return segment.name, len(image)


def take(shared: tuple[str, int]) -> list[torch.Tensor]:
    name, tokens = shared
    segment = SharedMemory(name)
    whole = torch.frombuffer(segment.buf, dtype=DTYPE, count=tokens * WIDTH).view(tokens, WIDTH)
    copies = spans(whole)
    del whole  # or the segment could not be closed
    segment.close()
    segment.unlink()
    return copies


def dump_handles(value: Any) -> bytes:
    from torch.multiprocessing.reductions import ForkingPickler

    return bytes(ForkingPickler.dumps(value))


def ways() -> dict[str, Way]:
    made = {
        'tensors': Way(spans, list),
        'one buffer': Way(parts, copied),
        'pieces': Way(pieces, copied),
        'spans': Way(packed, unpacked),
        'one buffer, kept': Way(parts, copied, kept=True),
        'pieces, kept': Way(pieces, copied, kept=True),
        'spans, kept': Way(packed, unpacked, kept=True),
        'shared memory': Way(share, take),
    }
    if torch.cuda.is_available():
        made['CUDA IPC'] = Way(lambda image: image.cuda(), lambda whole: spans(whole), dump_handles)
    return made


class Meter:
    """What the calling thread has used since the last reading."""

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> dict[str, float]:
        """Seconds by the clock, seconds of a processor, page faults."""
        last, self._last = self._last, self._read()
        return {key: value - last[key] for key, value in self._last.items()}

    @staticmethod
    def _read() -> dict[str, float]:
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        return {'clock': time.perf_counter(), 'processor': time.thread_time(), 'faults': faults}


def engine(name: str, ports: Connection) -> None:
    """The receiving process: answers each message with when it arrived and what it took until tensors were there."""
    way = ways()[name]
    way.enter_process()
    socket = zmq.Context().socket(zmq.ROUTER)
    ports.send(socket.bind_to_random_port('tcp://localhost'))
    while True:
        client, data = socket.recv_multipart()
        arrived = time.perf_counter()  # the same clock in all processes
        meter = Meter()
        message = pickle.loads(data)
        if message is None:
            return
        value, check = message
        tensors = way.tensors(value)
        if name == 'CUDA IPC':
            torch.cuda.synchronize()
        used, right = meter(), None
        if check:
            expected = embeddings(sum(map(len, tensors)))
            right = torch.equal(torch.cat(tensors).cpu(), expected)
        socket.send_multipart([client, pickle.dumps((arrived, used, right))])


def api(name: str, port: int, orders: Connection) -> None:
    """The sending process: sends so many requests of so many tokens as it is told, and says what that took."""
    way = ways()[name]
    way.enter_process()
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT)
    socket.connect(f'tcp://localhost:{port}')
    while (order := orders.recv()) is not None:
        tokens, number, check = order
        orders.send(send(socket, way, embeddings(tokens), number, check))
    socket.setsockopt(zmq.LINGER, TIMEOUT)
    socket.send(pickle.dumps(None))


def send(socket: Any, way: Way, image: torch.Tensor, number: int, check: bool) -> list[dict[str, Any]]:
    """Send requests without waiting for answers in between; what each phase used, for each request."""
    took, sent = [], []
    for _ in range(number):
        meter = Meter()
        value = way.prepare(image)
        prepare = meter()
        message = way.dumps((value, check))
        size = len(message)
        socket.send(message)
        sent.append(time.perf_counter())
        took.append({'prepare': prepare, 'send': meter(), 'message_bytes': size})
        del value, message
    for phases, end in zip(took, sent, strict=True):
        arrived, used, right = pickle.loads(socket.recv())
        assert right is not False, 'the engine got other values'
        phases |= {'transport': {'clock': max(0.0, arrived - end)}, 'receive': used}
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

    def send(self, tokens: int, number: int, check: bool = False) -> list[dict[str, Any]]:
        self._orders.send((tokens, number, check))
        answer: list[dict[str, Any]] = self._orders.recv()
        return answer

    def stop(self) -> None:
        self._orders.send(None)
        for process in (self._api, self._engine):
            process.join(10)
            process.kill()
            process.join()


def measure(case: str, rounds: int, in_flight: Sequence[int]) -> list[dict[str, Any]]:
    context = multiprocessing.get_context('spawn')
    pairs = {name: Pair(name, context) for name in ways()}
    tokens, rows = TOKENS[case], []
    for pair in pairs.values():
        pair.send(tokens, 1, check=True)
    for number in in_flight:
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in pairs}
        for turn in range(1 + max(3, rounds // number)):
            for name, pair in pairs.items():
                times = pair.send(tokens, number)
                taken[name] += times if turn else []  # a first one, for memory that is taken once
        rows += [{'case': case, 'tokens': tokens, 'in_flight': number, **row(name, taken[name])} for name in pairs]
    for pair in pairs.values():
        pair.stop()
    return rows


def row(name: str, times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def median(phase: str, unit: str) -> float:
        return statistics.median(one[phase][unit] for one in times)

    return {
        'way': name,
        'milliseconds': {phase: round(median(phase, 'clock') * 1e3, 3) for phase in PHASES},
        'processor_milliseconds': {phase: round(median(phase, 'processor') * 1e3, 3) for phase in LOOPS},
        'page_faults': {phase: median(phase, 'faults') for phase in LOOPS},
        'requests': len(times),
        'message_bytes': times[0]['message_bytes'],
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table('tokens', 'in flight', 'way', *PHASES, 'loops', 'computing', 'page faults')
    table.title = 'Medians in milliseconds for one request; loops: send and receive; computing: their processor time'
    for one in rows:
        times = one['milliseconds']
        cells = [str(one['tokens']), str(one['in_flight']), one['way'], *(f'{times[phase]:.2f}' for phase in PHASES)]
        computing = f'{sum(one["processor_milliseconds"].values()):.2f}'
        faults = f'{sum(one["page_faults"].values()):.0f}'
        table.add_row(*cells, f'{sum(times[phase] for phase in LOOPS):.2f}', computing, faults)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=100, help='requests for each way and number in flight')
    parser.add_argument('--in-flight', type=int, nargs='+', default=[1, 32], help='requests sent at a time')
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args()
    rows = [row for case in TOKENS for row in measure(case, arguments.rounds, arguments.in_flight)]
    show(rows)
    if arguments.output:
        content = {'facts': facts(), 'width': WIDTH, 'dtype': str(DTYPE), 'rows': rows}
        arguments.output.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    main()
