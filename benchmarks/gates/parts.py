"""The parts of ``on-gpu``: what each is for, the commands that it runs, and what it takes of its limit."""

import argparse
import contextlib
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.gates import estimates
from benchmarks.gates.estimates import HANDOVERS, Item

DUMMY_WEIGHTS = {'LMDEPLOY_VICO_DUMMY_WEIGHTS': '1'}  # a checkpoint without weights: servers make them up
# test_compiled.py compiles ahead of time, for which it needs no GPU.
KERNEL_TESTS = ('tests/kernels', '--ignore', 'tests/kernels/test_compiled.py')
SMALLEST = '1B'  # of the published sizes; those of tiny checkpoints are not made for TurboMind's kernels
NO_TURBOMIND = 'TurboMind needs a CUDA device'
MEMCHECK_TESTS = ('tests/kernels', '-k', 'triton and (sizes_of_models or heads or many)')


@dataclass(frozen=True)
class Step:
    """One command of a part, with variables added to its environment; or why it cannot run on this machine."""

    title: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ''


@dataclass(frozen=True)
class Setup:
    """What the commands depend on.

    Attributes:
        python: the interpreter that runs them.
        cuda: whether there is a GPU to measure; without one, everything is small and tries the commands only.
        scratch: a folder for checkpoints.
        prefix: what the paths of the results begin with.
        prompts: requests of a cell.
        server: more arguments of the server in first-token parts.
    """

    python: str
    cuda: bool
    scratch: Path
    prefix: str
    prompts: int
    server: tuple[str, ...] = ()

    @property
    def load(self) -> tuple[str, ...]:
        """The options that say how much is asked of a server at a time."""
        clients, tiles = (32, 10) if self.cuda else (3, 3)
        return '--num-prompts', str(self.prompts), '--max-concurrency', str(clients), '--tiles', str(tiles)

    def run(self, *arguments: str) -> tuple[str, ...]:
        """A benchmark's command."""
        return self.python, '-m', 'benchmarks', *arguments

    def test(self, *arguments: str) -> tuple[str, ...]:
        """A command that runs tests."""
        return self.python, '-m', 'pytest', '-q', *arguments

    def device(self, like: str) -> tuple[str, ...]:
        """The options that say which ViT is measured where."""
        return ('--like', like, '--device', 'cuda') if self.cuda else ('--like', 'tiny', '--device', 'cpu')

    def result(self, what: str) -> str:
        """The file for a result."""
        return f'{self.prefix}-{what}.json'


def checks_kernels(setup: Setup) -> Iterator[Step]:
    yield Step('kernels against float64', setup.test(*KERNEL_TESTS))


def checks_vision(setup: Setup) -> Iterator[Step]:
    yield Step('vision side', setup.test('-m', 'gpu', 'tests/gpu', '-k', 'not engine'))


def checks_engine(setup: Setup, kind: str) -> Iterator[Step]:
    yield Step(f'engine, {kind}', setup.test('-m', 'gpu', 'tests/gpu', '-k', f'engine and {kind}'))


def memcheck(setup: Setup) -> Iterator[Step]:
    checker = ('compute-sanitizer', '--tool', 'memcheck', '--error-exitcode', '9')
    if not (setup.cuda and shutil.which(checker[0])):
        yield Step('memory checker', skipped='it needs a CUDA device and compute-sanitizer')
        return
    # Without PyTorch's cache every tensor is an allocation of its own: a wrong access meets no neighbour's memory.
    alone = {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}
    yield Step('memory checker', (*checker, *setup.test(*MEMCHECK_TESTS)), alone)


def kernels(setup: Setup) -> Iterator[Step]:
    yield Step('kernel timings', setup.run('kernels', f'--benchmark-json={setup.result("kernels")}'))


def flips(setup: Setup) -> Iterator[Step]:
    widths, prompts = ((1024, 3200), 32) if setup.cuda else ((256,), 1)
    for width in widths:
        options = ('--width', str(width), '--prompts', str(prompts))
        command = setup.run('flips', *options, '--output', setup.result(f'routing-flips-{width}'))
        yield Step(f'routing flips, D = {width}', command)


VISION_OPTIONS = {
    '300M': ('--images', '48', '--latencies', '60', '--seconds', '2'),
    '6B': ('--images', '8', '--latencies', '10', '--seconds', '2', '--parts', 'stage', 'latency'),
}
VISION_OPTIONS_ON_CPU = (
    '--images',
    '2',
    '--latencies',
    '3',
    '--seconds',
    '0.5',
    '--parts',
    'preparation',
    'stage',
    'latency',
)


def vision(setup: Setup, vit: str) -> Iterator[Step]:
    options = (*setup.device(vit), *(VISION_OPTIONS[vit] if setup.cuda else VISION_OPTIONS_ON_CPU))
    yield Step(f'vision side, ViT {vit}', setup.run('vision', *options, '--output', setup.result(f'vision-{vit}')))


def vit_speed(setup: Setup, vit: str) -> Iterator[Step]:
    output = setup.result(f'vit-speed-{vit}')
    yield Step(f'switches of ViT {vit}', setup.run('vit-speed', *setup.device(vit), '--output', output))


def handover(setup: Setup) -> Iterator[Step]:
    options = ('--rounds', str(HANDOVERS)) if setup.cuda else ('--rounds', '3', '--widths', '2048')
    yield Step('hand-over to the engine', setup.run('handover', *options, '--output', setup.result('handover')))


def checkpoint(setup: Setup, model: str, *options: str) -> tuple[Path, list[Step]]:
    """A model's checkpoint and the steps that make it, if it is not there yet; without a GPU a tiny one of its kind."""
    path = setup.scratch / ''.join([model, *options])
    what = 'random weights' if options else 'config and tokenizer'
    if (path / 'config.json').exists():
        return path, []
    kind: tuple[str, ...] = ('--like', model, *options)
    if not setup.cuda:
        kind = {'30B-A3B': ('--llm', 'moe'), '38B': ('--vit', 'rms_norm')}.get(model, ())
    command = (setup.python, '-m', 'lmdeploy_vico.cli', 'tiny', str(path), *kind)
    return path, [Step(f'{model}: {what}', command)]


def placement(setup: Setup, against: str) -> Iterator[Step]:
    if against == 'mps' and not (setup.cuda and shutil.which('nvidia-cuda-mps-control')):
        yield Step('placement under MPS', skipped='it needs a CUDA device and nvidia-cuda-mps-control')
        return
    model, made = checkpoint(setup, '8B')
    yield from made
    options = ('--model', str(model), '--against', against, *setup.load, '--repeats', '2' if setup.cuda else '1')
    command = setup.run('placement', *options, '--output', setup.result(f'placement-{against}'))
    yield Step(f'8B: placement, two processes against {against}', command, DUMMY_WEIGHTS)


def first_token(setup: Setup, what: str, model: Path, mode: str, *options: str) -> tuple[str, ...]:
    """The command that measures a model's first-token throughput."""
    files = ('--output-file', setup.result(what), '--plot', f'{setup.prefix}-{what}.png')
    server = ('--', *setup.server) if setup.server else ()
    return setup.run('first-token', '--model', str(model), '--mode', mode, *setup.load, *options, *files, *server)


def llm(setup: Setup, name: str, text: int) -> Iterator[Step]:
    model, made = checkpoint(setup, name)
    yield from made
    options = ['--text-tokens', str(text), '--token-compression', '0', '0.25', '0.5', '0.75']
    options += ['--count-prefills'] if name == '8B' else []
    command = first_token(setup, f'llm-{name}-{text}', model, 'llm', *options)
    yield Step(f'{name}: language model alone, {text} text tokens', command, DUMMY_WEIGHTS)


def image(setup: Setup, name: str) -> Iterator[Step]:
    model, made = checkpoint(setup, name)
    yield from made
    options = ('--text-tokens', '64', '--token-compression', '0', '0.5', '0.75', '--count-prefills')
    yield Step(f'{name}: images', first_token(setup, f'image-{name}', model, 'image', *options), DUMMY_WEIGHTS)


def baselines(setup: Setup, name: str, mode: str) -> Iterator[Step]:
    model, made = checkpoint(setup, name, '--weights')
    baseline = f'lmdeploy-{mode}'
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, model, ignore_errors=True)  # 18 GB
        yield from made
        options = ['--text-tokens', '64', '--token-compression', '0', '0.75']
        options += ['--baseline', baseline, '--servers', 'in-turn']
        command = first_token(setup, f'baselines-{name}-{mode}', model, 'image', *options)
        yield Step(f'{name}: images, against {baseline}', command)


def checks_turbomind(setup: Setup) -> Iterator[Step]:
    if not setup.cuda:
        yield Step('TurboMind', skipped=NO_TURBOMIND)
        return
    model, made = checkpoint(setup, SMALLEST, '--weights')
    yield from made
    environment = {'VICO_TURBOMIND_CHECKPOINT': str(model)}
    yield Step(f'{SMALLEST} on TurboMind', setup.test('-m', 'gpu', 'tests/gpu/test_turbomind.py'), environment)


def turbomind(setup: Setup, name: str, text: int) -> Iterator[Step]:
    if not setup.cuda:
        yield Step(f'{name} on TurboMind', skipped=NO_TURBOMIND)
        return
    model, made = checkpoint(setup, name, '--weights')
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, model, ignore_errors=True)  # 18 GB
        yield from made
        options = ['--text-tokens', str(text), '--token-compression', '0', '0.25', '0.5', '0.75']
        options += ['--language-engine', 'pytorch', 'turbomind', '--servers', 'in-turn']
        command = first_token(setup, f'turbomind-{name}-{text}', model, 'llm', *options)
        yield Step(f'{name}: language model alone on both engines, {text} text tokens', command)


SHARE_ON_CPU = ('--like', 'tiny', '--tp', '2', '--tiles', '3', '--text-tokens', '64', '--rounds', '1', '--steps', '1')


def share(setup: Setup, name: str, tp: int) -> Iterator[Step]:
    options = ('--like', name, '--tp', str(tp)) if setup.cuda else SHARE_ON_CPU
    command = setup.run('share', *options, '--output', setup.result(f'share-{name}'))
    yield Step(f'{name}: the share of one of {tp} ranks', command)


def soak(setup: Setup) -> Iterator[Step]:
    requests = '2000' if setup.cuda else '24'
    yield Step('soak', setup.run('soak', '--requests', requests, '--output-file', setup.result('soak')))


def bench_check(setup: Setup) -> Iterator[Step]:
    baseline = ('--baseline', setup.result('check'))
    options = () if setup.cuda else ('--like', 'tiny', '--cases', 'digests', '--turns', '2')
    yield Step('ratios to compare with', setup.run('check', '--update', *baseline, *options))
    yield Step('the same again', setup.run('check', *baseline, *options))


@dataclass(frozen=True)
class Part:
    """What can run on a machine of its own.

    Attributes:
        why: what it finds out; parts that stand together and say the same share a line of the help.
        steps: its commands, each made when the one before has ended.
        items: what that takes, to be added up.
        model: which the device has to have memory for; None for those that fit anywhere.
        tp: ranks among which it is split, of which the device holds the share of one.
    """

    name: str
    why: str
    steps: Callable[[Setup], Iterator[Step]]
    items: Callable[[], list[Item]]
    model: str | None = None
    tp: int = 1


CHECKS = 'kernels against float64; vision side and engine against the independent reference'
VISION = "tiles/s, images/s and latency against LMDeploy's"
SWITCHES = 'the switches that may make the ViT faster, on and off in turns'
PLACEMENT = '8B: vision side and engine in two processes, against one, or against two under MPS'
LLM = (
    "the paper's Table 4: first-token throughput of the language model alone, by token compression, with 64 or 512 "
    'text tokens; 38B needs more memory than an H100 has and is skipped there'
)
TURBOMIND = (
    'the same Table 4 on TurboMind and on the PyTorch engine in one run; writes 18 GB of random weights to a scratch '
    'folder, as TurboMind makes none up'
)
BASELINES = 'image-8B against LMDeploy without the plugin; writes 18 GB of random weights to a scratch folder'

SHARED, RANKS = '241B', 8
SHARE = (
    f"the {SHARED}'s row of that table by one GPU: the share of one of {RANKS} ranks is measured; all-reduces are "
    'added by the model of lmdeploy-vico plan and shown apart'
)

PARTS = (
    Part('checks-kernels', CHECKS, checks_kernels, estimates.checks_kernels),
    Part('checks-vision', CHECKS, checks_vision, estimates.checks_vision),
    *(
        Part(f'checks-engine-{kind}', CHECKS, partial(checks_engine, kind=kind), estimates.checks_engine)
        for kind in ('dense', 'moe')
    ),
    Part('memcheck', 'the kernels under compute-sanitizer, if it is installed', memcheck, estimates.memcheck),
    Part('kernels', 'timings of the kernels', kernels, estimates.kernels),
    Part('flips', 'how often routing in bfloat16 differs from float64', flips, estimates.flips),
    *(
        Part(f'vision-{vit}', VISION, partial(vision, vit=vit), partial(estimates.vision, vit))
        for vit in ('300M', '6B')
    ),
    *(
        Part(f'vit-speed-{vit}', SWITCHES, partial(vit_speed, vit=vit), partial(estimates.vit_speed, vit))
        for vit in ('300M', '6B')
    ),
    Part('handover', 'the ways to hand visual tokens to the engine', handover, estimates.handover),
    Part('placement', PLACEMENT, partial(placement, against='one'), estimates.placement, '8B'),
    Part('placement-mps', PLACEMENT, partial(placement, against='mps'), estimates.placement, '8B'),
    *(
        Part(f'llm-{name}-{text}', LLM, partial(llm, name=name, text=text), partial(estimates.llm, name, text), name)
        for name in ('8B', '30B-A3B', '38B')
        for text in (64, 512)
    ),
    Part(
        f'share-{SHARED}',
        SHARE,
        partial(share, name=SHARED, tp=RANKS),
        partial(estimates.share, SHARED, RANKS),
        SHARED,
        RANKS,
    ),
    Part(
        'image-8B',
        'the same from images to first token, vision side included',
        partial(image, name='8B'),
        partial(estimates.image, '8B'),
        '8B',
    ),
    *(
        Part(
            f'baselines-8B-{mode}',
            BASELINES,
            partial(baselines, name='8B', mode=mode),
            partial(estimates.baselines, '8B', mode),
            '8B',
        )
        for mode in ('flash', 'internvl')
    ),
    Part(
        'checks-turbomind',
        'answers of a checkpoint of the 1B size on TurboMind against the independent reference',
        checks_turbomind,
        estimates.checks_turbomind,
        SMALLEST,
    ),
    *(
        Part(
            f'turbomind-8B-{text}',
            TURBOMIND,
            partial(turbomind, name='8B', text=text),
            partial(estimates.turbomind, '8B', text),
            '8B',
        )
        for text in (64, 512)
    ),
    Part('soak', '2000 requests with cancels: every answer right, nothing grows', soak, estimates.soak),
    Part(
        'bench-check',
        'stores the ratios that "make bench-check" compares with, and compares once',
        bench_check,
        estimates.bench_check,
    ),
)


def find(name: str) -> Part:
    """Return the part of that name; as argparse's type, an unknown one is an error of the command line."""
    for part in PARTS:
        if part.name == name:
            return part
    raise argparse.ArgumentTypeError(f'there is no part {name}; "python -m benchmarks on-gpu --help" lists them')


def described(parts: Sequence[Part] = PARTS) -> str:
    """The names, and below them what they are for."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        groups.setdefault(part.why, []).append(part.name)
    texts = []
    for why, names in groups.items():
        for text, indent in ((', '.join(names), '  '), (why, '      ')):
            texts += textwrap.wrap(text, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return '\n'.join(texts)
