"""Each of the ViT's switches (``vit_speedups``) alone, and all together, against none: is it right, what does it gain?

    python -m benchmarks vit-speed --like 300M --device cuda --output vit-speed-300M.json
    python -m benchmarks vit-speed --like tiny --device cpu --output /tmp/vit-speed.json     # tries the script itself

First correctness, through the encoder as it serves. Patch tokens are compared with the same weights in more digits
(float32 on a GPU, float64 on a CPU): a switch rounds as often as the plain operations do or less often, so that its
error may be half as large again as theirs, and not more. And bits: a tile alone, at every place of a batch, in company
that changes, gives the same ones. What is wrong is not timed.

Then time: batches of the encoder's own size, on a GPU as one CUDA graph, as they are served, the variants in turns.
None stands there twice: what the second one seems to gain is noise. A verdict follows for each switch: "turn on" where
the bits hold and a GPU gains LEAST_GAIN and twice the noise, by the median and by the fastest turns.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib import models
from benchmarks.lib.facts import facts
from benchmarks.lib.timing import Timing, graphed, interleaved
from lmdeploy_vico.choices import NO_SPEEDUPS, SPEEDUPS, Speedups
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.model.speedups import find_obstacle
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import TILE_SHAPE

NONE, CONTROL, ALL = 'none', 'none again', 'all'
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # relative norm error of the plain operations
ERROR_RATIO = 1.5  # of a variant's error to theirs
LEAST_GAIN = 1.0  # percent
SECONDS = 5.0  # of timing for each variant
LIMIT = 540  # seconds of a run, below the ten minutes that some machines give a command
# Seconds for weights, reference, captures, kernels and checks: estimates, on a CPU for few layers.
SET_UP = {('300M', 'cuda'): 90, ('6B', 'cuda'): 180, ('tiny', 'cuda'): 60, ('tiny', 'cpu'): 60}


@dataclass
class Variant:
    """One set of switches and what was found.

    Attributes:
        speedups: the switches.
        error: relative norm error of its patch tokens.
        right: whether that is within the bound.
        bits: whether a tile's bits are the same wherever it stands.
        timing: seconds of one batch; None for what is wrong.
        gain: percent more tiles a second than with none, by the median.
        sure_gain: the lower one of that and of the same by the fastest turns.
        verdict: what follows.
    """

    speedups: Speedups
    error: float = 0.0
    right: bool = False
    bits: bool = False
    timing: Timing | None = None
    gain: float | None = None
    sure_gain: float | None = None
    verdict: str = ''


class Bench:
    """A ViT with random weights and one encoder for each variant, all of them on the same weights."""

    def __init__(self, like: str, layers: int | None, device: torch.device) -> None:
        self.device = device
        self.config = VicoConfig.from_dict(models.config(like, layers))
        loaded = TileEncoder.load(models.RandomCheckpoint(keep=False), self.config, device=device, graph=False)
        self.dtype = loaded.dtype
        # On a CPU two at least, so that there are places to stand at.
        self.tile_batch = max(2, loaded.tile_batch)
        self.tower = loaded.tower
        disturb_vectors(self.tower)
        self.rng = np.random.default_rng(20)
        self.obstacles = {name: find_obstacle(name, self.config.vision, device, self.dtype) for name in SPEEDUPS}
        possible = [name for name, obstacle in self.obstacles.items() if not obstacle]
        self.variants = {NONE: Variant(NO_SPEEDUPS)}
        self.variants |= {name: Variant(Speedups(**{name: True})) for name in possible}
        if len(possible) > 1:
            self.variants[ALL] = Variant(Speedups(**dict.fromkeys(possible, True)))
        self.encoders: dict[str, TileEncoder] = {}

    def tiles(self, count: int) -> list[np.ndarray]:
        return list(self.rng.integers(0, 256, (count, *TILE_SHAPE), dtype=np.uint8))

    @torch.inference_mode()
    def reference(self, tiles: list[np.ndarray]) -> torch.Tensor:
        """Patch tokens of the tiles with more digits, one after the other; ``[n, 1024, D]``."""
        digits = torch.float64 if self.device.type == 'cpu' else torch.float32
        exact = copy.deepcopy(self.tower.vision_model).to(digits)
        return torch.cat([exact(torch.from_numpy(tile)[None].to(self.device))[:, 1:].double().cpu() for tile in tiles])

    @torch.inference_mode()
    def make_encoder(self, speedups: Speedups) -> TileEncoder:
        """An encoder on the same weights, captured with these switches."""
        with torch.device('meta'):
            tower = VisionTower(self.config, speedups)
        tower.load_state_dict(self.tower.state_dict(), assign=True)
        tower.freeze()
        return TileEncoder(tower, self.config, self.tile_batch)

    def check(self) -> None:
        """Find out for every variant whether it is right and whether its bits hold."""
        tiles = self.tiles(2)
        expected = self.reference(tiles)
        for name, variant in self.variants.items():
            encoder = self.encoders[name] = self.make_encoder(variant.speedups)
            patches = torch.stack(encoder.features(np.stack(tiles)).patches).double()
            variant.error = ((patches - expected).norm() / expected.norm()).item()
            plain = self.variants[NONE].error
            variant.right = variant.error <= (LARGEST_ERROR[self.dtype] if name == NONE else ERROR_RATIO * plain)
            variant.bits = self.bits_hold(encoder, tiles)

    def bits_hold(self, encoder: TileEncoder, tiles: list[np.ndarray]) -> bool:
        """Whether each tile's patch tokens and score are the same alone and at every place, whatever stands beside."""
        for tile in tiles:
            alone = encoder.start([tile]).wait()
            companies = [self.tiles(self.tile_batch) for _ in range(self.tile_batch)]
            companies += [[np.zeros_like(tile)] * self.tile_batch, [tile] * self.tile_batch]
            for number, company in enumerate(companies):
                place = number % self.tile_batch
                company[place] = tile
                batch = encoder.start(company).wait()
                same = torch.equal(batch.patches[place], alone.patches[0])
                if not same or not torch.equal(batch.scores[place], alone.scores[0]):
                    return False
        return True

    @torch.inference_mode()
    def time(self, seconds: float) -> float:
        """Time what is right, in turns; returns the noise in percent."""
        batch = torch.from_numpy(np.stack(self.tiles(self.tile_batch))).to(self.device)

        def call(name: str) -> Callable[[], object]:
            def run() -> object:
                return self.encoders[name].tower.encode(batch)

            return graphed(run) if self.device.type == 'cuda' else run

        turns = {name: call(name) for name, variant in self.variants.items() if variant.right}
        timings = interleaved({**turns, CONTROL: call(NONE)}, seconds)
        plain = timings[NONE]
        for name in turns:
            variant, timing = self.variants[name], timings[name]
            variant.timing, variant.gain = timing, gain(plain.median, timing.median)
            variant.sure_gain = min(variant.gain, gain(plain.fastest, timing.fastest))
        return abs(gain(plain.median, timings[CONTROL].median))


def disturb_vectors(tower: VisionTower) -> None:
    """Norms, layer scales and biases that are not all alike, so that one left out or taken for another would show."""
    with torch.no_grad():
        for weight in tower.vision_model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.05)


def gain(before: float, after: float) -> float:
    """Percent more a second."""
    return 100 * (before / after - 1)


def judge(variant: Variant, noise: float, device: torch.device) -> str:
    """What follows for a switch."""
    if not variant.right:
        return f'leave off: wrong by {variant.error:.1e}'
    assert variant.gain is not None and variant.sure_gain is not None
    if not variant.bits:
        return f'leave off: bits do not hold ({variant.gain:+.1f} %)'
    if device.type == 'cpu':
        return f'leave off: {variant.gain:+.1f} % on a CPU, which says nothing of a GPU'
    if variant.sure_gain < max(LEAST_GAIN, 2 * noise):
        return f'leave off: {variant.gain:+.1f} % (noise {noise:.1f} %)'
    return f'turn on: {variant.gain:+.1f} %'


def plan(like: str, device: str, seconds: float) -> tuple[float, str]:
    """The seconds that a run will take at most, and how they come about."""
    turns = len(SPEEDUPS) + 3  # none, none again, all
    set_up = SET_UP.get((like, device), 300)
    total = turns * seconds + set_up
    return total, (
        f'Timing: {turns} variants x {seconds:g} s = {turns * seconds:g} s at most; set-up and checks: about '
        f'{set_up} s (estimate); together {total:g} s of {LIMIT} s.'
    )


def show(bench: Bench, noise: float, console: Console) -> None:
    title = f'ViT with and without speed-ups: batches of {bench.tile_batch} tiles, {bench.dtype}'
    table = Table('variant', 'error', 'bits', 'ms a batch', 'tiles/s', 'gain', title=title)
    for name, variant in bench.variants.items():
        timing = variant.timing
        table.add_row(
            *(name, f'{variant.error:.1e}' + ('' if variant.right else ' WRONG'), 'same' if variant.bits else 'DIFFER'),
            f'{timing.median * 1e3:.2f}' if timing else '-',
            f'{bench.tile_batch / timing.median:.1f}' if timing else '-',
            f'{variant.gain:+.1f} %' if variant.gain is not None else '-',
        )
    console.print(table)
    console.print(f'None against itself: {noise:.1f} %.')
    for name, obstacle in bench.obstacles.items():
        console.print(f'{name}: {bench.variants[name].verdict if not obstacle else f"not here, it {obstacle}"}')
    if ALL in bench.variants:
        console.print(f'{ALL}: {bench.variants[ALL].verdict}')


def results(bench: Bench, arguments: argparse.Namespace, noise: float) -> dict[str, Any]:
    found = {
        name: {**asdict(variant), 'speedups': str(variant.speedups), 'tiles_per_second': None}
        for name, variant in bench.variants.items()
    }
    for name, variant in bench.variants.items():
        if variant.timing is not None:
            found[name]['tiles_per_second'] = bench.tile_batch / variant.timing.median
    return {
        'facts': facts(),
        'like': arguments.like,
        'layers': bench.config.vision.num_hidden_layers,
        'tile_batch': bench.tile_batch,
        'dtype': str(bench.dtype).removeprefix('torch.'),
        'noise_percent': noise,
        'variants': found,
        'not_here': {name: obstacle for name, obstacle in bench.obstacles.items() if obstacle},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status, 1 if a variant computes something else than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument('--like', choices=models.SIZES, default='300M' if cuda else 'tiny', help='size of the ViT')
    parser.add_argument('--layers', type=int, help='depth of the ViT, if it shall have fewer layers than that size')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if cuda else 'cpu')
    parser.add_argument('--seconds', type=float, default=SECONDS, help='of timing for each variant')
    parser.add_argument('--output', type=Path, required=True, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    total, arithmetic = plan(arguments.like, arguments.device, arguments.seconds)
    print(arithmetic, flush=True)
    if total > LIMIT:
        parser.error(f'that is more than {LIMIT} s: give fewer --seconds')

    torch.set_float32_matmul_precision('highest')  # of the reference
    torch.manual_seed(20)
    bench = Bench(arguments.like, arguments.layers, torch.device(arguments.device))
    bench.check()
    plain = bench.variants[NONE]
    noise = bench.time(arguments.seconds) if plain.right else 0.0
    for variant in bench.variants.values():
        variant.verdict = judge(variant, noise, bench.device) if plain.right else 'leave off: nothing to compare with'
    plain.verdict = '' if plain.right else f'wrong by {plain.error:.1e}'
    show(bench, noise, Console(width=160))
    arguments.output.write_text(json.dumps(results(bench, arguments, noise), indent=1) + '\n')
    return 0 if all(variant.right for variant in bench.variants.values()) and plain.bits else 1
