"""What it costs to hand a prompt's visual tokens to the engine's process, by the ways in which that can be done.

A prompt of ten tiles at the 8B model's width (H = 4096, bfloat16), cut into spans of 64 tokens, is sent between two
processes as LMDeploy 0.18 sends a request: pickled in the API process's event loop, over a ZMQ socket on localhost
(TCP, DEALER to ROUTER), unpickled in the engine's loop. Ways:

  tensors        a tensor for each span, as pickle takes it
  bytes          a bytes object for each span
  one buffer     bytes of the whole image, once, and each span's place in it (lmdeploy_vico/adapter/handover.py)
  shared memory  a segment of /dev/shm for the image, copied and unlinked by the receiver
  CUDA IPC       tensors on the GPU whose handles are sent (needs CUDA)

prepare: in a thread beside the event loop; send: in the API process's loop, where nothing else runs meanwhile;
transport: until the engine has the message; receive: in the engine's loop, until there are tensors. The engine compares
the values once for each way before anything is timed.

    python -m benchmarks.handover --output results.json
"""

import argparse
import json
import multiprocessing
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch
import zmq
from rich.console import Console
from rich.table import Table

from benchmarks.facts import facts
from lmdeploy_vico.adapter.handover import PackedEmbeddings, PackedRows

WIDTH, DTYPE = 4096, torch.bfloat16
BLOCK = 64  # tokens of a KV block
TOKENS = {'uncompressed': 2560, '75 % compressed': 1120}  # of ten tiles; round half up of 7.5 are 8: 8 * 64 + 2 * 256
PHASES = ('prepare', 'send', 'transport', 'receive')
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


def spans(image: torch.Tensor) -> list[torch.Tensor]:
    return [image[low:high].clone() for low, high in cuts(len(image))]


def packed(image: torch.Tensor) -> list[PackedRows]:
    whole = PackedEmbeddings.of(image)
    return [PackedRows(whole, low, high) for low, high in cuts(len(image))]


def packed_alone(image: torch.Tensor) -> list[PackedRows]:
    return [PackedRows(PackedEmbeddings.of(image[low:high]), 0, high - low) for low, high in cuts(len(image))]


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
        'bytes': Way(packed_alone, lambda rows: [part.tensor() for part in rows]),
        'one buffer': Way(packed, lambda rows: [part.tensor() for part in rows]),
        'shared memory': Way(share, take),
    }
    if torch.cuda.is_available():
        made['CUDA IPC'] = Way(lambda image: image.cuda(), lambda whole: spans(whole), dump_handles)
    return made


def engine(ports: Any) -> None:
    """The receiving process: answers each message with when it arrived and when its tensors were there."""
    socket = zmq.Context().socket(zmq.ROUTER)
    ports.send(socket.bind_to_random_port('tcp://localhost'))
    known = ways()
    while True:
        client, data = socket.recv_multipart()
        arrived = time.perf_counter()  # the same clock in all processes
        message = pickle.loads(data)
        if message is None:
            return
        way, value, check = message
        tensors = known[way].tensors(value)
        if way == 'CUDA IPC':
            torch.cuda.synchronize()
        ready = time.perf_counter()
        right = None
        if check:
            expected = embeddings(sum(map(len, tensors)))
            right = torch.equal(torch.cat(tensors).cpu(), expected)
        socket.send_multipart([client, pickle.dumps((arrived, ready, right))])


class Api:
    """The sending process's side."""

    def __init__(self, port: int) -> None:
        self.ways = ways()
        self.socket = zmq.Context().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, TIMEOUT)
        self.socket.connect(f'tcp://localhost:{port}')

    def send(self, name: str, images: Sequence[torch.Tensor], check: bool = False) -> list[dict[str, float]]:
        """Send requests without waiting for answers in between; seconds by phase, for each."""
        took, sent = [], []
        way = self.ways[name]
        for image in images:
            begun = time.perf_counter()
            value = way.prepare(image)
            prepared = time.perf_counter()
            self.socket.send(way.dumps((name, value, check)))
            sent.append(time.perf_counter())
            took.append({'prepare': prepared - begun, 'send': sent[-1] - prepared})
            del value
        for times, end in zip(took, sent, strict=True):
            arrived, ready, right = pickle.loads(self.socket.recv())
            assert right is not False, f'{name}: the engine got other values'
            times |= {'transport': max(0.0, arrived - end), 'receive': ready - arrived}
        return took

    def stop(self) -> None:
        self.socket.send(pickle.dumps(None))


def measure(api: Api, rounds: int, in_flight: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for case, tokens in TOKENS.items():
        image = embeddings(tokens)
        for name in api.ways:
            api.send(name, [image], check=True)
        for number in in_flight:
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in api.ways}
            for _ in range(max(3, rounds // number)):
                for name in api.ways:
                    taken[name] += api.send(name, [image] * number)
            for name, times in taken.items():
                milliseconds = {phase: statistics.median(one[phase] for one in times) * 1e3 for phase in PHASES}
                message = len(api.ways[name].dumps(api.ways[name].prepare(image))) if name != 'shared memory' else None
                row = {'case': case, 'tokens': tokens, 'in_flight': number, 'way': name, 'milliseconds': milliseconds}
                rows.append(row | {'requests': len(times), 'message_bytes': message})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table('tokens', 'in flight', 'way', *PHASES, 'send + receive', 'against tensors')
    table.title = 'Medians in milliseconds for one request'
    for row in rows:
        times = row['milliseconds']
        first = next(other for other in rows if all(other[key] == row[key] for key in ('tokens', 'in_flight')))
        loops, theirs = (one['send'] + one['receive'] for one in (times, first['milliseconds']))
        cells = [str(row['tokens']), str(row['in_flight']), row['way'], *(f'{times[phase]:.2f}' for phase in PHASES)]
        table.add_row(*cells, f'{loops:.2f}', f'{theirs / loops:.2f}x')
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=100, help='requests for each way and number in flight')
    parser.add_argument('--in-flight', type=int, nargs='+', default=[1, 32], help='requests sent at a time')
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args()
    context = multiprocessing.get_context('spawn')
    ports, theirs = context.Pipe()
    process = context.Process(target=engine, args=(theirs,), daemon=True)
    process.start()
    try:
        api = Api(ports.recv())
        rows = measure(api, arguments.rounds, arguments.in_flight)
        api.stop()
        process.join(10)
    finally:
        process.kill()
        process.join()
    show(rows)
    if arguments.output:
        content = {'facts': facts(), 'width': WIDTH, 'dtype': str(DTYPE), 'rows': rows}
        arguments.output.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    main()
