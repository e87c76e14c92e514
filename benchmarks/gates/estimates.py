"""What the parts of ``on-gpu`` do on a GPU, and the seconds that each thing takes at most.

The rates are estimates on the safe side for an H100 or H200: about half of what such a GPU reaches in large matrix
products, half of the tiles/s aimed at, and starts with nothing compiled before. They decide how much is measured, never
what comes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gates.targets import prefill_flop
from benchmarks.lib.timing import PATIENCE
from benchmarks.share import turns
from benchmarks.share.model import rank_share
from lmdeploy_vico.checkpoints.random.published import MODELS, weight_bytes

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
GB = 1e9
IMAGE_SHARES, BASELINE_SHARES, LLM_SHARES = (0.0, 0.5, 0.75), (0.0, 0.75), (0.0, 0.25, 0.5, 0.75)
WARM_UP = 5 + 2 * CLIENTS  # requests of a cell before it is measured: every number of compressed tiles, then many
HANDOVERS = 24  # rounds of the hand-over benchmark
COUNTED = (1 + 4) * CLIENTS  # requests of a cell whose prefill steps are counted: lmdeploy_vico/bench/prefills.py


@dataclass(frozen=True)
class Item:
    """So many times so many seconds; ``count`` None is the number of requests of a cell, which is to be found."""

    what: str
    seconds: float
    count: float | None = 1


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


def llm(model: str, text: int) -> list[Item]:
    each, counting = cells(model, text, LLM_SHARES), model == '8B'
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


def turbomind(model: str, text: int) -> list[Item]:
    written, each = weight_bytes(model) / GB, cells(model, text, LLM_SHARES)
    return [
        Item(f'{written:.0f} GB of weights written', written * DISK),
        *starts(model, 3, files=True),  # the first engine, the other one, the first again
        Item(f'a request in each of {len(LLM_SHARES)} cells, to warm up, three times', each, 3 * WARM_UP),
        Item('the same on both engines, measured', 2 * each, None),
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
    """The most that ``timing.undisturbed`` takes for a case: all its patience or four turns, and a turn to warm up."""
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
    return [Item('start', SESSION), Item('variants in turns, set-up and checks: its own plan', total)]


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


def checks_kernels() -> list[Item]:
    """Every test compiles for its own sizes, two or three times. The counts are checked by pytest's collection."""
    return [
        Item('start', SESSION),
        Item('a test of a Triton kernel, compiling included', 2.0, 187),
        Item('random sizes for a Triton kernel, 30 of them', 15, 6),
        Item('a test that compiles nothing', 0.1, 406),
    ]


def checks_vision() -> list[Item]:
    return [
        Item('start', SESSION),
        Item('encoders made, warmed up and captured', 15, 6),
        Item('tiles encoded by three implementations on the CPU', 1.0, 2 * 18 * 3),
        Item('tests of permutations and groups', 10, 10),
    ]


def checks_engine() -> list[Item]:
    return [
        Item('start', SESSION),
        Item('an engine started with an empty cache of kernels', FIRST_START),
        Item('engines after it', START, 2),
        Item('twelve answers judged by the reference on the CPU', 40, 1),
        Item('answers', 1.0, 3 * 2 * 12),
    ]


def checks_turbomind(model: str = '1B') -> list[Item]:
    written = weight_bytes(model) / GB
    return [
        Item(f'{written:.0f} GB of weights written', written * DISK),
        Item('start of the tests', SESSION),
        *starts(model, 1, files=True),
        Item('twelve answers judged by the reference on the CPU', 200, 1),
        Item('answers', 1.0, 2 * 12),
    ]


def memcheck() -> list[Item]:
    return [Item('start under the memory checker', 2 * SESSION), Item('a test, twenty times slower', 8, 57)]


def kernels() -> list[Item]:
    return [
        Item('start, measured ceilings', SESSION + 5),
        Item('a row: five competitors for 0.3 s, checked, compiled', 5 * 0.3 + 5, 40),
        Item('routers made, with a float64 one', 10, 2),
    ]


def flips() -> list[Item]:
    return [Item('start', SESSION, 2), Item('a prompt in float64, bfloat16 and ours', 0.4, 2 * 4 * 32)]


def share(model: str, tp: int) -> list[Item]:
    works = turns.kinds(TILES, turns.TEXTS, LLM_SHARES)
    held = weight_bytes(rank_share(MODELS[model], tp)) / GB
    turn = sum(
        prefill(model, work.text_tokens, work.compression) / tp * (turns.ALONE + turns.filling(work, turns.STEPS))
        for work in works
    )
    return [
        Item(f'start, {held:.0f} GB of weights made up on the device', FIRST_START + held * LOAD),
        Item(f'a turn of each of {len(works)} cells', turn, 1 + turns.ROUNDS),
    ]


def soak() -> list[Item]:
    return [
        Item('a server of a tiny checkpoint', FIRST_START),
        Item('a request among 16 clients', 0.08, MANY),
        Item('a prompt alone', 0.1, 0.84 * MANY),  # one of five shows one of 32 pictures, one of ten is cancelled
    ]


def bench_check() -> list[Item]:
    return [Item('start, weights made on the device', SESSION, 2), Item('a case: six rounds of five turns', 25, 2 * 5)]
