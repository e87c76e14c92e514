"""How long a part of on_gpu.sh may take on a GPU, by arithmetic that it prints, and how many requests fit in its limit.

    python -m benchmarks.budget llm-8B-64 soak --memory 139             # prints it
    python -m benchmarks.budget llm-8B-64 soak --folder plans           # writes plans/llm-8B-64 and plans/soak

The rates are estimates on the safe side for an H100 or H200: about half of what such a GPU reaches in large matrix
products, half of the tiles/s aimed at, starts with nothing compiled before. They decide how much is measured, never
what comes out. A part's last line is how many requests of a cell fit, or a sentence that says why it is not to be run:
SKIPPED where its model does not fit the device, REFUSED where too few requests fit.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gates.targets import prefill_flop
from lmdeploy_vico.checkpoints.random.published import MODELS, weight_bytes

LIMIT = 600  # seconds of a part
RESERVE = 60  # of them for on_gpu.sh itself, and to stop servers and write what there is
FEWEST = 32  # requests of a cell that say anything
MANY = 2000  # of a cell in the paper
CLIENTS, TILES = 32, 10

PREFILL = {'dense': 350e12, 'moe': 120e12}  # FLOP/s of prefills that run eagerly
VIT = {'300M': 300.0, '6B': 24.0}  # tiles/s
REQUEST = 0.005  # seconds of HTTP and hand-over in the API process, which nothing hides
LMDEPLOY_PICTURE = 0.1  # seconds of LMDeploy's one thread for a picture of ten tiles
PICTURE = 0.025  # seconds to make one, on all cores
FIRST_START, START = 100.0, 45.0  # seconds of a server, the first with an empty cache of compiled kernels
LOAD = 1.0  # seconds a GB of weights: made up on the device, or read from files just written
DISK = 2.5  # seconds a GB written
SESSION = 30.0  # seconds of a Python process that imports everything and takes the device
PATIENCE = 4  # benchmarks/timing.py, undisturbed: so many times the seconds where others use the machine
SPARE = 8.0  # GiB beside the weights for KV blocks, activations and the contexts of two processes
GIB, GB = 2**30, 1e9
IMAGE_SHARES, BASELINE_SHARES, LLM_SHARES = (0.0, 0.5, 0.75), (0.0, 0.75), (0.0, 0.25, 0.5, 0.75)
WARM_UP = 5 + 2 * CLIENTS  # requests of a cell before it is measured: every number of compressed tiles, then many
HANDOVERS = 24  # rounds of benchmarks/handover.py
COUNTED = (1 + 4) * CLIENTS  # requests of a cell whose prefill steps are counted: lmdeploy_vico/bench/prefills.py


@dataclass(frozen=True)
class Item:
    """So many times so many seconds; ``count`` None is the number of requests of a cell, which is to be found."""

    what: str
    seconds: float
    count: float | None = 1


class NotHereError(RuntimeError):
    """A model does not fit the device."""


def prefill(model: str, text: int, share: float) -> float:
    """Seconds of a prompt of ten tiles in the language model."""
    shape = MODELS[model]
    return prefill_flop(shape.size, TILES * 256 * (1 - share) + text) / PREFILL[shape.llm]


def cells(model: str, text: int, shares: Sequence[float], image: bool = False) -> float:
    """Seconds of one request in each of the cells."""
    vit = TILES / VIT['300M'] if image else 0.0
    return sum(prefill(model, text, share) + vit + REQUEST for share in shares)


def starts(model: str, number: int, files: bool = False) -> list[Item]:
    """Servers after another: the first compiles for all."""
    loading = weight_bytes(model) / GB * LOAD
    how = 'read' if files else 'made up on the device'
    made = [Item(f'first start, {weight_bytes(model) / GB:.0f} GB of weights {how}', FIRST_START + loading)]
    return made + ([Item('starts after it', START + loading, number - 1)] if number > 1 else [])


def llm(model: str, text: str) -> list[Item]:
    each, counting = cells(model, int(text), LLM_SHARES), model == '8B'
    return [
        *starts(model, 1 + counting),
        Item(f'a request in each of {len(LLM_SHARES)} cells, to warm up', each, WARM_UP),
        *([Item('the same, to count prefill steps', each, COUNTED)] if counting else []),
        Item('the same, measured', each, None),
    ]


def image(model: str) -> list[Item]:
    each = cells(model, 64, IMAGE_SHARES, image=True)
    return [
        *starts(model, 2),
        Item('pictures made', PICTURE, None),
        Item(f'a request in each of {len(IMAGE_SHARES)} cells, to warm up', each, WARM_UP),
        Item('the same, to count prefill steps', each, COUNTED),
        Item('the same, measured', each, None),
    ]


def baselines(model: str, name: str) -> list[Item]:
    written = weight_bytes(model) / GB * (2 if name == 'internvl' else 1)  # again, without a router
    ours = cells(model, 64, BASELINE_SHARES, image=True)
    theirs = prefill(model, 64, 0.0) + TILES / VIT['300M'] + LMDEPLOY_PICTURE + REQUEST
    return [
        Item(f'{written:.0f} GB of weights written', written * DISK),
        *starts(model, 3, files=True),
        Item('pictures made', PICTURE, None),
        Item('a request in each of our cells, to warm up, twice', ours, 2 * WARM_UP),
        Item("a request in LMDeploy's cell, to warm up", theirs, WARM_UP),
        Item('a request in each of our cells, measured', ours, None),
        Item("a request in LMDeploy's cell, measured", theirs, None),
    ]


def placement(model: str = '8B', runs: int = 4) -> list[Item]:
    each = cells(model, 64, BASELINE_SHARES, image=True)
    return [
        *starts(model, runs),
        Item(f'pictures made, {runs} times', runs * PICTURE, None),
        Item(f'a request in both cells of {runs} runs, to warm up', runs * each, WARM_UP),
        Item(f'a request in both cells of {runs} runs, measured', runs * each, None),
    ]


def undisturbed(functions: int, seconds: float, turn: float) -> float:
    """The most that benchmarks/timing.py takes for a case: its time with all patience, or four turns; and one more."""
    return max(PATIENCE * functions * seconds, 4 * turn) + turn


def vision(vit: str) -> list[Item]:
    rate, seconds = VIT[vit], 2.0
    images, latencies = (48, 60) if vit == '300M' else (8, 10)
    turn = 3 * images * TILES / rate  # ours, LMDeploy's flash and plain
    made = [
        Item('start, weights made on the device, twice', 2 * SESSION),
        Item('stage', undisturbed(3, seconds, turn)),
        Item('pictures one at a time, three competitors', 3 * (0.15 + 13 / rate), latencies + 2),
        Item('pictures made, by one thread', 0.15, images + latencies),
    ]
    if vit == '300M':
        lmdeploy = images * LMDEPLOY_PICTURE / 2
        made += [
            Item('preparation of a mix of pictures', undisturbed(2, seconds, lmdeploy + 1), 4),
            Item('steps of preparation', undisturbed(6, seconds / 4, 0.2), 2),
            Item('preparation by threads', undisturbed(2, seconds, images * 0.05), 2),
            Item('end to end, a mix of pictures', undisturbed(3, seconds, 2 * lmdeploy + turn), 4),
            Item('pictures of the mixes made, by one thread', 0.15, 4 * images),
        ]
    return made


def vit_speed(vit: str) -> list[Item]:
    from benchmarks.vision.vit_speed import SECONDS, plan  # takes seconds to import

    total, _ = plan(vit, 'cuda', SECONDS)
    return [Item('start', SESSION), Item('variants in turns, set-up and checks: the plan of vit_speed.py', total)]


def handover() -> list[Item]:
    from benchmarks.serving import handover as run
    from benchmarks.serving.prompt_tokens import TOKENS

    shapes, ways = len(run.WIDTHS) * len(TOKENS), len(run.ways(cuda=True))
    sent = 1 + sum(number * run.turns(HANDOVERS, number) for number in run.IN_FLIGHT)
    return [
        Item('start with LMDeploy, Ray and a worker', SESSION + 30),
        Item('a prompt to a worker, by four ways for a width', 0.05, len(run.WIDTHS) * 4 * (3 + HANDOVERS)),
        Item(f'two processes of each of {ways} ways, for a width and a size', 3.0 * ways, shapes),
        Item('a prompt to the engine, and its part of a copy', 0.03, shapes * ways * sent),
    ]


def fixed(*items: Item) -> Callable[[], list[Item]]:
    return lambda: list(items)


PARTS: dict[str, Callable[..., list[Item]]] = {
    # Kernels: every test compiles for its own sizes, two or three times. The counts are checked by pytest's collection.
    'checks-kernels': fixed(
        Item('start', SESSION),
        Item('a test of a Triton kernel, compiling included', 2.0, 184),
        Item('random sizes for a Triton kernel, 30 of them', 15, 6),
        Item('a test that compiles nothing', 0.1, 395),
    ),
    'checks-vision': fixed(
        Item('start', SESSION),
        Item('encoders made, warmed up and captured', 15, 6),
        Item('tiles encoded by three implementations on the CPU', 1.0, 2 * 18 * 3),
        Item('tests of permutations and groups', 10, 10),
    ),
    'checks-engine': lambda llm: [
        Item('start', SESSION),
        Item('an engine started with an empty cache of kernels', FIRST_START),
        Item('engines after it', START, 2),
        Item('twelve answers judged by the reference on the CPU', 40, 1),
        Item('answers', 1.0, 3 * 2 * 12),
    ],
    'memcheck': fixed(Item('start under the memory checker', 2 * SESSION), Item('a test, twenty times slower', 8, 57)),
    'kernels': fixed(
        Item('start, measured ceilings', SESSION + 5),
        Item('a row: five competitors for 0.3 s, checked, compiled', 5 * 0.3 + 5, 40),
        Item('routers made, with a float64 one', 10, 2),
    ),
    'flips': fixed(Item('start', SESSION, 2), Item('a prompt in float64, bfloat16 and ours', 0.4, 2 * 4 * 32)),
    'vision': vision,
    'vit-speed': vit_speed,
    'handover': handover,
    'placement': placement,
    'placement-mps': placement,
    'llm': llm,
    'image': image,
    'baselines': baselines,
    'soak': fixed(
        Item('a server of a tiny checkpoint', FIRST_START),
        Item('a request among 16 clients', 0.08, MANY),
        Item('a prompt alone', 0.1, 0.84 * MANY),  # one of five shows one of 32 pictures, one of ten is cancelled
    ),
    'bench-check': fixed(
        Item('start, weights made on the device', SESSION, 2), Item('a case: six rounds of five turns', 25, 2 * 5)
    ),
}


def items(part: str) -> list[Item]:
    """What a part does; its name may go on with a model, and text tokens or a baseline."""
    name = max((known for known in PARTS if part == known or part.startswith(f'{known}-')), key=len, default=None)
    if name is None:
        raise KeyError(part)
    words = part.removeprefix(name).removeprefix('-')
    if name in ('llm', 'baselines'):
        return PARTS[name](*words.rsplit('-', 1))
    return PARTS[name](*([words] if words else []))


def require_memory(part: str, memory: float) -> None:
    """Raises :class:`NotHereError` where the part's model does not fit so many GiB."""
    model = next((name for name in sorted(MODELS, key=len, reverse=True) if f'-{name}' in part), None)
    if model is None or part.startswith(('vision', 'vit')):
        return
    needed = weight_bytes(model) / GIB + SPARE
    if needed > memory:
        raise NotHereError(
            f'{model} needs {needed:.0f} GiB, {needed - SPARE:.0f} of them for its weights; this device has '
            f'{memory:.0f} GiB.'
        )


def requests(todo: Sequence[Item], limit: float, most: int) -> int:
    """How many requests of a cell fit, in steps of the clients' number."""
    left = limit - RESERVE - sum(item.seconds * item.count for item in todo if item.count is not None)
    each = sum(item.seconds for item in todo if item.count is None)
    if not each:
        return most
    fit = int(left / each)
    return min(most, fit // CLIENTS * CLIENTS) if fit >= CLIENTS else max(0, min(most, fit))


def lines(part: str, todo: Sequence[Item], number: int, limit: float) -> Iterator[str]:
    """The arithmetic, for people."""
    total = 0.0
    for item in todo:
        count = number if item.count is None else item.count
        total += item.seconds * count
        yield f'    {count:7.0f} x {item.seconds:7.2f} s = {item.seconds * count:6.0f} s  {item.what}'
    yield f'==> {part}: at most {total:.0f} s by these estimates, {RESERVE} s in reserve, of {limit:.0f} s'


def plan(part: str, limit: float, most: int, memory: float) -> list[str]:
    """The arithmetic of a part, and as its last line what follows from it; raises KeyError for an unknown part."""
    todo = items(part)
    try:
        require_memory(part, memory)
    except NotHereError as error:
        return [f'==> {part}: SKIPPED. {error}']
    number = requests(todo, limit, most)
    total = sum(item.seconds * (number if item.count is None else item.count) for item in todo)
    fits = total <= limit - RESERVE and number >= min(FEWEST, most)
    return [
        *lines(part, todo, number, limit),
        str(number) if fits else f'==> {part}: REFUSED, there is too little time.',
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='+', metavar='PART')
    parser.add_argument('--most', type=int, default=MANY, help='requests of a cell (default: %(default)s)')
    parser.add_argument('--limit', type=float, default=LIMIT, help='seconds of a part (default: %(default)s)')
    parser.add_argument('--memory', type=float, default=float('inf'), metavar='GIB', help='of the device')
    parser.add_argument('--folder', type=Path, help='write a file for each part there, instead of printing')
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        try:
            text = '\n'.join(plan(part, arguments.limit, arguments.most, arguments.memory))
        except KeyError:
            parser.error(f'there is no part {part}')
        if arguments.folder:
            (arguments.folder / part).write_text(f'{text}\n')
        else:
            print(text)
    return 0
