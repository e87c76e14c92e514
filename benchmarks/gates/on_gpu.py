"""Takes the numbers that need a CUDA device, and compares them with the targets.

Without a PART: all of them, the checks first. Each part can run on a machine of its own. It takes at most ten minutes
on one H100 or H200: before it starts, it prints an estimate of its time, from which follows how many requests it sends.
"""

import argparse
import dataclasses
import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks import RESULTS, ROOT
from benchmarks.gates import targets
from benchmarks.gates.budget import LIMIT, plan
from benchmarks.gates.estimates import MANY
from benchmarks.gates.parts import PARTS, Part, Setup, described, find
from benchmarks.gates.runner import Runner

ENVIRONMENT = """\
environment:
  PYTHON         the interpreter of the commands (default: the one that runs this), with the plugin installed
  LIMIT          seconds of a part (default 600; no limit without a GPU). A part that is not done by then, or when this
                 command is told to end (TERM), is ended and keeps what it has measured.
  PROMPTS        at most so many requests of a cell (default 2000, as in the paper, or what fits the limit)
  SERVER         more arguments of `lmdeploy serve api_server` in the first-token parts, such as '--tp 2'
  TMPDIR         where the scratch folder is made
  VICO_TEST_DEVICE=cpu
                 tries the commands without a GPU, with tiny checkpoints and few requests

Every step prints its time. One that fails does not stop the others; the exit status says whether one did: 0 all
succeeded, 1 one failed, 2 nothing could be run, 143 it was told to end.
"""
REQUESTS_ON_CPU = 6  # of a cell without a GPU
# In a process of its own, which gives the device back.
PROBE = """import re, torch
cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name() if cuda else "cpu"
memory = torch.cuda.get_device_properties(0).total_memory // 2**30 if cuda else 0
print(re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")), memory)"""


class NotHereError(RuntimeError):
    """Nothing can be run on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the commands run: their environment, the device's name and its memory in GiB."""

    python: str
    environment: dict[str, str]
    device: str
    memory: int

    @property
    def cuda(self) -> bool:
        """Whether a GPU is to be measured."""
        return self.environment['VICO_TEST_DEVICE'] == 'cuda'


def look(python: str) -> Machine:
    """Find out what this machine has; raises :class:`NotHereError` where nothing can be measured."""
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    defaults = {'VICO_TEST_DEVICE': 'cuda', 'OMP_WAIT_POLICY': 'PASSIVE'}
    environment = {**defaults, **os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': os.pathsep.join(paths)}
    if environment['VICO_TEST_DEVICE'] != 'cuda':
        environment['CUDA_VISIBLE_DEVICES'] = ''  # a GPU that happens to be there is left alone

    def ask(*command: str) -> str:
        answer = subprocess.run([python, *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return answer.stdout

    found = ask('-c', PROBE).split()
    if len(found) != 2:
        raise NotHereError(f'{python} cannot use torch; what it says above is why')
    device, memory = found
    machine = Machine(python, environment, device, int(memory))
    if machine.cuda and device == 'cpu':
        raise NotHereError('there is no CUDA device; VICO_TEST_DEVICE=cpu tries the commands without one')
    active = ask('-m', 'lmdeploy_vico.cli', 'env')
    if not re.search(r'^plugin *active', active, re.MULTILINE):
        raise NotHereError(
            f'the plugin is not active for {python}: install it with pip, --target on PYTHONPATH will do.\n{active}'
        )
    return machine


def run_parts(parts: Sequence[Part], runner: Runner, setup: Setup, machine: Machine, limit: float | None) -> None:
    """Run the parts, each with as many requests as its limit leaves."""
    for part in parts:
        if runner.ended:
            runner.failed.append(f'{part.name} was not begun')
            continue
        prompts = setup.prompts
        if machine.cuda and limit is not None:
            made = plan(part, limit, setup.prompts, machine.memory)
            runner.say('\n'.join(made.lines))
            if not made.requests:
                runner.failed += [part.name] if made.refused else []
                continue
            prompts = made.requests
        for step in part.steps(dataclasses.replace(setup, prompts=prompts)):
            runner.step(step)
        runner.end_part()


def run(parts: Sequence[Part], results: Path, machine: Machine) -> int:
    """Run the parts and compare with the targets; returns the exit status."""
    limit = float(os.environ.get('LIMIT') or LIMIT) if machine.cuda or os.environ.get('LIMIT') else None
    most = int(os.environ.get('PROMPTS') or (MANY if machine.cuda else REQUESTS_ON_CPU))
    results.mkdir(parents=True, exist_ok=True)
    prefix = str(results / f'{datetime.date.today()}-{machine.device}')
    log = Path(f'{prefix}-{parts[0].name if len(parts) == 1 else "on-gpu"}.log')
    spent = time.time() - psutil.Process().create_time()  # to find out what this machine has
    runner = Runner(log, limit, machine.environment, ROOT, spent)
    with tempfile.TemporaryDirectory(prefix='vico-on-gpu-') as scratch:
        server = tuple(shlex.split(os.environ.get('SERVER', '')))
        setup = Setup(machine.python, machine.cuda, Path(scratch), prefix, most, server)
        run_parts(parts, runner, setup, machine, limit)
    targets.main([str(results)])
    for what in runner.failed:
        runner.say(f'==> failed: {what}')
    if runner.failed:
        return 143 if runner.ended else 1
    runner.say(f'==> all done in {runner.seconds} s; results in {results}')
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage='%(prog)s [-o FOLDER] [PART ...]',
        description=__doc__,
        epilog=f'parts:\n{described()}\n\n{ENVIRONMENT}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('parts', nargs='*', metavar='PART', type=find, help='(default: all)')
    parser.add_argument(
        '-o',
        dest='results',
        metavar='FOLDER',
        type=Path,
        default=RESULTS,
        help='for DATE-DEVICE-WHAT.json, .png of first-token throughput, and DATE-DEVICE-PART.log with all that was '
        'printed (default: benchmarks/results)',
    )
    arguments = parser.parse_args(argv)
    try:
        machine = look(os.environ.get('PYTHON') or sys.executable)
    except NotHereError as error:
        print(f'on-gpu: {error}', file=sys.stderr)
        return 2
    return run(arguments.parts or PARTS, arguments.results.resolve(), machine)
