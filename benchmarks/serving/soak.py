"""Thousands of requests, some of whose clients leave: every answer is right, and the server does not grow.

Sixteen clients send pictures of one or three tiles, hardly two of a size, most of them new, some seen before; a share
of the requests is dropped by closing the connection at a random time. Afterwards every prompt is asked again, alone:
its answer must be the one it got in company. On a GPU, where the engine computes in float16 and sums in another order
in a batch of another size, the first token that differs must be a near tie by the log-probabilities of both answers;
what follows it is another answer and not compared. Each client keeps its connection, so an answer too many, or to
another's request, would be taken for the next one's and found wrong. The memory, file descriptors and threads of the
server's processes, and device memory, are compared between the second and the last quarter of the run, if the first is
long enough to warm up.

    python -m benchmarks soak --requests 2000 --output-file soak.json

Starts a server of a tiny checkpoint, with the arguments in --serve, unless --base-url names one. The last line says
what was found; the exit code is 1 if anything was wrong.
"""

import argparse
import base64
import http.client
import io
import itertools
import json
import random
import re
import shlex
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.lib.facts import facts
from benchmarks.serving.answers import NEAR_TIE, Answer, gap
from benchmarks.serving.growth import COUNTS, MEMORY, Sampler
from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.launch import ApiServer, ServerError

MAX_TOKENS = 4
SIDES = (48, 192)  # of a picture, each drawn by itself: hardly two have the same size
REPEATED, POOL = 0.2, 32  # how many of the requests show a picture of the pool, and how large that is
CACHE_BYTES = 8 << 20  # of our own server: full, and evicting, long before the first quarter is over
TIMEOUT = 120  # seconds for an answer
TOP = 5  # log-probabilities asked for at each position
PROMPT_WAIT = 1.0  # seconds after which the first request that follows the run must be on the device


# --- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One request: which prompt it sends; when its client leaves, as a share of the usual time to an answer."""

    prompt: int
    leaves: float | None = None
    stream: bool = False


class SoakError(RuntimeError):
    """The server did not answer as it should have."""


def plan(requests: int, cancel: float, seed: int) -> list[Planned]:
    """Prompts below ``POOL`` are repeated, the others are sent once."""
    rng = random.Random(seed)
    fresh = itertools.count(POOL)
    planned = []
    for _ in range(requests):
        prompt = rng.randrange(POOL) if rng.random() < REPEATED else next(fresh)
        if rng.random() < cancel:
            planned.append(Planned(prompt, rng.uniform(0, 1.5), rng.random() < 0.5))
        else:
            planned.append(Planned(prompt))
    return planned


def body(model: str, prompt: int, seed: int, stream: bool = False, logprobs: bool = False) -> bytes:
    """A chat request whose picture and words are those of this prompt alone."""
    rng = np.random.default_rng([seed, prompt])
    detail = int(rng.choice([4, 16, 64]))
    width, height = map(int, rng.integers(*SIDES, 2, endpoint=True))
    picture = Image.fromarray(rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG')
    url = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    content = [
        {'type': 'text', 'text': f'Picture {prompt}: '},
        {'type': 'image_url', 'image_url': {'url': url, 'max_dynamic_patch': 2}},
    ]
    options = {'max_tokens': MAX_TOKENS, 'temperature': 0, 'ignore_eos': True, 'return_token_ids': True}
    if logprobs:
        options |= {'logprobs': True, 'top_logprobs': TOP}
    messages = [{'role': 'user', 'content': content}]
    return json.dumps({'model': model, 'messages': messages, 'stream': stream, **options}).encode()


class Client:
    """One client: a connection that it keeps until it leaves."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT)

    def ask(self, payload: bytes) -> Answer:
        """The answer; raises SoakError if there is none, or not one alone."""
        try:
            self._send(payload)
            response = self._connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise SoakError(f'status {response.status}: {text[:200].decode(errors="replace")}')
            return Answer.of(json.loads(text))
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self.close()
            raise SoakError(f'{type(error).__name__}: {error}') from error

    def leave(self, payload: bytes, seconds: float) -> None:
        """Ask, and close the connection after a time, answered or not."""
        try:
            self._send(payload)
            time.sleep(seconds)
        except (OSError, http.client.HTTPException) as error:
            raise SoakError(f'{type(error).__name__}: {error}') from error
        finally:
            self.close()

    def _send(self, payload: bytes) -> None:
        self._connection.request('POST', '/v1/chat/completions', payload, {'Content-Type': 'application/json'})

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()


def get(url: str) -> str:
    """What a GET of ``url`` returns; raises SoakError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read().decode()
    except OSError as error:
        raise SoakError(f'{url} does not answer: {error}') from error


def queue_wait(url: str) -> tuple[float, float]:
    """Seconds that all prompts so far waited for the device, and how many these were."""
    text = get(f'{url}/metrics')
    name = 'vico:encoder_queue_wait_seconds'
    total, count = (re.search(rf'^{name}_{part} (\S+)$', text, re.MULTILINE) for part in ('sum', 'count'))
    if total is None or count is None:
        raise SoakError(f'{url}/metrics has no {name}: is a ViCO checkpoint served there?')
    return float(total[1]), float(count[1])


# --- the run ---------------------------------------------------------------------------------------------------------


class Soak:
    """The requests of one run, and what became of them."""

    def __init__(self, url: str, planned: Sequence[Planned], arguments: argparse.Namespace, progress: Progress) -> None:
        self.url, self.planned, self.progress = url, planned, progress
        self.clients, self.seed, self.near_tie = arguments.clients, arguments.seed, arguments.near_tie
        self.model = json.loads(get(f'{url}/v1/models'))['data'][0]['id']
        self.answers: dict[int, list[Answer]] = {}
        self.cancelled = 0
        self.problems: list[str] = []
        self.near_ties: list[float] = []  # gaps of answers that differ within what is allowed
        self._ended = False
        self._usual = 0.5  # seconds to an answer, smoothed
        self._lock = threading.Lock()

    def send(self, sampler: Sampler) -> None:
        """Send all, from many clients."""
        task = self.progress.add_task('in company', total=len(self.planned))
        left = iter(self.planned)

        def serve(client: Client) -> None:
            while True:
                with self._lock:
                    request = next(left, None)
                if request is None or self._ended:
                    client.close()
                    return
                self._one(client, request)
                with self._lock:
                    sampler.finished += 1
                self.progress.advance(task)

        with ThreadPoolExecutor(self.clients) as pool:
            try:
                list(pool.map(serve, [Client(self.url) for _ in range(self.clients)]))
            except BaseException:
                self._ended = True  # or the pool would wait for all that is left
                raise

    def _one(self, client: Client, request: Planned) -> None:
        payload = body(self.model, request.prompt, self.seed, request.stream, self.near_tie > 0)
        try:
            if request.leaves is not None:
                client.leave(payload, request.leaves * self._usual)
                with self._lock:
                    self.cancelled += 1
                return
            began = time.perf_counter()
            answer = client.ask(payload)
            with self._lock:
                self._usual += 0.1 * (time.perf_counter() - began - self._usual)
                self.answers.setdefault(request.prompt, []).append(answer)
        except SoakError as error:
            self.problems.append(f'Prompt {request.prompt} was not answered: {error}.')

    def ask_alone(self) -> tuple[int, float]:
        """Ask every answered prompt again, one at a time, and compare.

        Returns:
            How many different answers there are, and how long the first of these requests waited for the device.
        """
        client = Client(self.url)
        alone: dict[int, Answer] = {}
        task = self.progress.add_task('alone', total=len(self.answers))
        waited, count = queue_wait(self.url)
        for prompt in sorted(self.answers):
            try:
                alone[prompt] = client.ask(body(self.model, prompt, self.seed, logprobs=self.near_tie > 0))
            except SoakError as error:
                self.problems.append(f'Prompt {prompt}, alone, was not answered: {error}.')
                continue
            if len(alone) == 1:
                total, now = queue_wait(self.url)
                waited = total - waited if now == count + 1 else float('inf')
            for answer in self.answers[prompt]:
                self._compare(prompt, answer, alone[prompt])
            self.progress.advance(task)
        client.close()
        return len(set(alone.values())), waited

    def _compare(self, prompt: int, answer: Answer, alone: Answer) -> None:
        far = gap(answer, alone)
        if far > self.near_tie:
            self.problems.append(f'Prompt {prompt}: {answer} in company, {alone} alone.')
        elif answer != alone:
            self.near_ties.append(far)


def soak(url: str, pid: int | None, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Run it; ``problems`` in what is returned has a sentence for each."""
    run = Soak(url, plan(arguments.requests, arguments.cancel, arguments.seed), arguments, progress)
    sampler = Sampler(pid)
    began, seconds, different, waited = time.perf_counter(), 0.0, 0, 0.0
    try:
        with sampler.running():
            run.send(sampler)
        seconds = time.perf_counter() - began
        different, waited = run.ask_alone()
    except KeyboardInterrupt:  # what there is by now is kept
        run.problems.append('The run was ended before all was asked and compared.')
    seconds = seconds or time.perf_counter() - began
    answered = sum(len(answers) for answers in run.answers.values())
    if answered + run.cancelled != arguments.requests:
        run.problems.append(f'Of {arguments.requests} requests, {run.cancelled} cancelled, {answered} were answered.')
    if waited > PROMPT_WAIT:
        run.problems.append(
            f'After the run, a request waited {waited:.2f} s for the device: something was still queued.'
        )
    run.problems += sampler.growth(arguments.requests)
    return {
        'answered': answered,
        'cancelled': run.cancelled,
        'prompts': len(run.answers),
        'different_answers': different,
        'near_ties': len(run.near_ties),
        'largest_near_tie': round(max(run.near_ties, default=0.0), 5),
        'seconds': round(seconds, 1),
        'queue_wait_after_the_run': round(waited, 4),
        'medians_by_quarter': sampler.medians(arguments.requests),
        'growth_judged': sampler.judges(arguments.requests),
        'samples': sampler.samples[:: max(1, len(sampler.samples) // 50)],
        'problems': run.problems,
    }


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """URL and process id of the server to use."""
    if arguments.base_url:
        yield arguments.base_url.rstrip('/').removesuffix('/v1'), arguments.pid
        return
    with tempfile.TemporaryDirectory(prefix='vico-soak-') as scratch:
        # In float32, which LMDeploy makes float16 on a GPU: in bfloat16 there are eight times as many near ties.
        checkpoint = make_tiny_checkpoint(Path(scratch) / 'tiny', dtype='float32')
        environment = {'LMDEPLOY_VICO_CACHE_BYTES': str(CACHE_BYTES)}
        # What answers say of their tokens' probabilities has to be asked for at the start.
        given = ['--logprobs-mode', 'raw_logprobs'] if arguments.near_tie else []
        given += shlex.split(arguments.serve)
        with ApiServer(checkpoint, *given, log=Path(scratch) / 'server.log', environment=environment) as started:
            yield started.url, started.pid


def report(result: dict[str, Any], console: Console) -> None:
    """Print what was measured, and the sentence."""
    for name in (*MEMORY, *COUNTS):
        values = [quarter.get(name) for quarter in result['medians_by_quarter']]
        if None not in values:
            shown = [f'{value / 2**20:.1f}' if name in MEMORY else f'{value:.0f}' for value in values]
            console.print(
                f'{name.replace("_", " ")}{" (MiB)" if name in MEMORY else ""} by quarter: {", ".join(shown)}'
            )
    for problem in result['problems'][:20]:
        console.print(problem, style='red')
    if result['near_ties']:
        most = result['largest_near_tie']
        console.print(f'{result["near_ties"]} answers differ from a near tie on: at most {most:.4f} apart.')
    counts = f'{result["answered"]} answers and {result["cancelled"]} cancels in {result["seconds"]:.0f} s'
    grew = 'nothing grew' if result['growth_judged'] else 'too short a run to say whether anything grew'
    wrong = len(result['problems'])
    console.print(f'{counts}: ' + (f'{wrong} problems.' if wrong else f'every answer right, {grew}.'))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--requests', type=int, default=2000, help='requests in all (default: %(default)s)')
    parser.add_argument(
        '--cancel', type=float, default=0.1, help='share of requests whose client leaves (default: %(default)s)'
    )
    parser.add_argument('--clients', type=int, default=16, help='requests at a time (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of pictures, order and cancels (default: %(default)s)')
    parser.add_argument(
        '--near-tie',
        type=float,
        default=NEAR_TIE if torch.cuda.is_available() else 0.0,
        metavar='NATS',
        help='how far apart in log-probability two tokens may be that change places alone and in company; a server at '
        '--base-url then needs --logprobs-mode raw_logprobs (default: %(default)s; 0: ids must be the same)',
    )
    parser.add_argument('--base-url', help='address of a running server, instead of starting one')
    parser.add_argument('--pid', type=int, help='process id of that server; without it, only device memory is watched')
    parser.add_argument(
        '--serve',
        default='',
        metavar='ARGUMENTS',
        help='of the server that is started, for example "--tp 2"; with four ranks sums are rounded to other near ties',
    )
    parser.add_argument('--output-file', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    # Told to end, it keeps what there is and stops its server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=120)
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with server(arguments) as (url, pid), Progress(*columns, console=console) as progress:
            result = soak(url, pid, arguments, progress)
    except (SoakError, ServerError) as error:
        console.print(error, style='red')
        return 1
    report(result, console)
    if arguments.output_file:
        asked = {
            name: getattr(arguments, name) for name in ('requests', 'cancel', 'clients', 'seed', 'near_tie', 'serve')
        }
        arguments.output_file.write_text(json.dumps({**facts(), **asked, **result}, indent=1) + '\n')
    return 1 if result['problems'] else 0
