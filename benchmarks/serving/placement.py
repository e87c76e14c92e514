"""Where vision side and language model should stand on one GPU: first-token throughput of three placements.

  two processes        as ``lmdeploy serve api_server`` is: the API server's process encodes, the engine has its own,
                       and the two take turns on the GPU
  two processes, MPS   the same under NVIDIA's multi-process service, which lets them use the GPU at the same time
                       (needs a GPU and nvidia-cuda-mps-control)
  one process          the engine in the API server's process, on a stream of its own; both share Python's lock

Two processes are compared with one of the others (--against). Each is served and measured by ``lmdeploy-vico bench`` in
image mode, one after the other and then again in reverse, so that drift cancels. Requests per second are added up over
the repeats.

    python -m benchmarks placement --model DIR --output results.json
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.facts import facts
from lmdeploy_vico import cli
from lmdeploy_vico.launch import ApiServer, ServerError

TWO, MPS, ONE = 'two processes', 'two processes, MPS', 'one process'
AGAINST = {'one': ONE, 'mps': MPS}
CONTROL = 'nvidia-cuda-mps-control'
CLOSING = 30  # seconds for the service to end


@dataclass(frozen=True)
class Total:
    """What was measured of one placement at one compression, over the repeats."""

    requests: int = 0
    seconds: float = 0.0
    failed: int = 0

    def plus(self, cell: dict[str, Any]) -> 'Total':
        return Total(self.requests + cell['completed'], self.seconds + cell['duration'], self.failed + cell['failed'])

    @property
    def throughput(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


@contextlib.contextmanager
def multi_process_service(folder: Path) -> Iterator[dict[str, str | None]]:
    """Run the service for the time of the context; what its clients need in their environment."""
    environment = {'CUDA_MPS_PIPE_DIRECTORY': str(folder / 'pipe'), 'CUDA_MPS_LOG_DIRECTORY': str(folder / 'log')}
    for directory in environment.values():
        Path(directory).mkdir(parents=True)
    full = {**os.environ, **environment}
    subprocess.run([CONTROL, '-d'], env=full, check=True)
    try:
        yield dict(environment)
    finally:
        subprocess.run([CONTROL], input='quit\n', text=True, env=full, check=False, timeout=CLOSING)


def with_service() -> bool:
    """Whether the multi-process service can be measured on this machine."""
    return torch.cuda.is_available() and shutil.which(CONTROL) is not None


def measure(placement: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Serve and measure one placement; the cells of the benchmark's result."""
    program = (sys.executable, '-m', 'benchmarks', 'one-process') if placement == ONE else None
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='vico-placement-')))
        environment: dict[str, str | None] = {'LMDEPLOY_VICO_CACHE_BYTES': '0'}  # cells share pictures
        if placement == MPS:
            environment |= stack.enter_context(multi_process_service(scratch / 'mps'))
        server = ApiServer(arguments.model, log=scratch / 'log', environment=environment, timeout=1800, program=program)
        stack.enter_context(server)
        result = scratch / 'result.json'
        command = ['bench', '--base-url', server.url, '--num-prompts', str(arguments.num_prompts)]
        command += ['--max-concurrency', str(arguments.max_concurrency), '--tiles', str(arguments.tiles)]
        command += ['--text-tokens', '64', '--token-compression', *map(str, arguments.token_compression)]
        if cli.main([*command, '--output-file', str(result)]) != 0:
            raise ServerError(f'{placement}: the benchmark failed:\n{server.log_tail()}')
        cells: list[dict[str, Any]] = json.loads(result.read_text())['cells']
        return cells


def table(totals: dict[tuple[str, float], Total]) -> Table:
    shares = sorted({share for _, share in totals})
    shown = Table('placement', *(f'{share:.0%} compressed' for share in shares), title='Requests per second')
    for placement in dict.fromkeys(name for name, _ in totals):
        cells = []
        for share in shares:
            total, first = totals[placement, share], totals[TWO, share]
            failed = f', {total.failed} failed' if total.failed else ''
            cells.append(f'{total.throughput:.2f} ({total.throughput / first.throughput:.2f}x{failed})')
        shown.add_row(placement, *cells)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='a checkpoint directory')
    parser.add_argument('--num-prompts', type=int, default=256, help='requests of each cell in each repeat')
    parser.add_argument('--max-concurrency', type=int, default=32)
    parser.add_argument('--tiles', type=int, default=10)
    parser.add_argument('--token-compression', type=float, nargs='+', default=[0.0, 0.75])
    parser.add_argument(
        '--against', choices=AGAINST, default='one', help='one process, or two under MPS (default: one)'
    )
    parser.add_argument('--repeats', type=int, default=2, help='the order is reversed from one to the next')
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    # Told to end, it keeps what there is and stops its server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, order = Console(width=120), [TWO, AGAINST[arguments.against]]
    if MPS in order and not with_service():
        console.print(f'{MPS} needs a CUDA device and {CONTROL}.', style='red')
        return 1
    totals: dict[tuple[str, float], Total] = {}
    status = 0
    try:
        for repeat in range(arguments.repeats):
            for placement in order if repeat % 2 == 0 else reversed(order):
                console.rule(f'{placement}, {repeat + 1} of {arguments.repeats}')
                for cell in measure(placement, arguments):
                    key = placement, cell['token_compression']
                    totals[key] = totals.get(key, Total()).plus(cell)
    except (ServerError, OSError, subprocess.SubprocessError, KeyboardInterrupt) as error:
        console.print(error or 'Ended before all was measured.', style='red', markup=False)
        status = 1
    if totals:  # what there is, also of a run that has not come to its end
        console.print(table(totals))
    if arguments.output and totals:
        names = ('num_prompts', 'max_concurrency', 'tiles', 'repeats')
        asked = {'model': Path(arguments.model).name} | {name: getattr(arguments, name) for name in names}
        rows = [
            {'placement': name, 'token_compression': share, 'request_throughput': total.throughput, **vars(total)}
            for (name, share), total in totals.items()
        ]
        content = {'facts': facts(), **asked, 'complete': not status, 'rows': rows}
        arguments.output.write_text(json.dumps(content, indent=1) + '\n')
    return status
