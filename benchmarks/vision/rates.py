"""The vision side against LMDeploy 0.18's, from JPEG bytes to visual tokens, in turns in one run.

    make bench                                      # on this machine, with a tiny ViT where there is no GPU
    python -m benchmarks vision --like 6B           # a ViT of a published size with random weights

Parts:
  preparation  JPEG bytes to tiles, decoding included, of pictures of one size and of a size each. Both decode with
               LMDeploy's own function in the event loop's default pool. Pixels are compared before anything is timed.
  work         where one core's time goes in that, and what more cores would give, by what threads gain here.
  stage        tiles/s from decoded 1344x1344 pictures, which need little cutting, to visual tokens on the host.
               LMDeploy gets its pixels prepared: only its vision path is timed. Embeddings are compared first.
  end to end   images/s from JPEG bytes to visual tokens.
  latency      one 1792x1344 picture (13 tiles) at a time, from bytes to visual tokens.

Turns in which other processes used the cores do not count; where there was no quiet, the results say so. What
LMDeploy's side leaves out is said in benchmarks/vision/lmdeploy_path.py. Without LMDeploy, ours is timed alone.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.lib import images, models
from benchmarks.lib.facts import facts
from benchmarks.lib.timing import QUIET, one_at_a_time, undisturbed
from lmdeploy_vico.config import IMAGE_MEAN, IMAGE_STD
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.resample import resize_into_tiles
from lmdeploy_vico.vision.tiling import Tiling, choose_grid, cut_tiles, tile_digests

try:
    from benchmarks.vision.lmdeploy_path import Preparation, VisionPath, build_model
except ImportError as error:
    MISSING = f'LMDeploy cannot be imported ({error})'
else:
    MISSING = ''

PARTS = ('preparation', 'work', 'stage', 'end to end', 'latency')
LIMITS = (1, 12)  # tiles of an image
IN_FLIGHT = 16  # clients of the servers that are imitated
COMPRESSION = 0.5
TOLERANCE = {'cpu': 1e-5, 'cuda': 5e-2}  # relative norm error of embeddings against LMDeploy's
LARGE = (1792, 1344)
Turns = dict[str, Callable[[], object]]


def load(data: bytes) -> Image.Image:
    """As LMDeploy's ImageMediaIO.load_bytes."""
    return Image.open(BytesIO(data)).convert('RGB')


class Bench:
    """Both sides, ready to be timed; every measurement gives rows of a table and of the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.threads = min(16, len(os.sched_getaffinity(0)))
        self.config = models.config(arguments.like, arguments.layers)
        self.encoder, weights = models.random_encoder(self.config, self.device, keep=not MISSING)
        dtype = self.encoder.dtype
        output = torch.bfloat16 if self.device.type == 'cuda' else dtype
        # Without a cache: a tile that has been encoded before must not be found again.
        self.stage = VisionStage([self.encoder], output, self.threads)
        self.prepare = ThreadPoolExecutor(self.threads)
        self.loop = asyncio.new_event_loop()
        self.theirs: dict[str, Any] = {}
        if not MISSING:
            self.preparation = Preparation(self.config, dtype)
            model = build_model(self.config, weights, self.device, dtype)
            self.theirs = {f'LMDeploy, {name}': VisionPath(model, name == 'flash') for name in ('flash', 'plain')}
        self.rows: list[dict[str, Any]] = []

    def close(self) -> None:
        self.stage.close()
        self.loop.close()

    def clients(self, work: Callable[[Any], Awaitable[object]], items: Sequence[Any]) -> None:
        """Work on the items, so many at a time, in one event loop."""

        async def run() -> None:
            free = asyncio.Semaphore(IN_FLIGHT)

            async def one(item: Any) -> None:
                async with free:
                    await work(item)

            await asyncio.gather(*map(one, items))

        self.loop.run_until_complete(run())

    def client(self, work: Callable[[Any], Awaitable[object]], item: Any) -> None:
        """Work on one item that is alone."""
        self.clients(work, [item])

    def measure(self, part: str, case: str, turns: Turns, units: float, unit: str) -> None:
        timings = undisturbed(turns, self.arguments.seconds)
        self.rows.append(
            {
                'part': part,
                'case': case,
                'unit': unit,
                'per_second': {name: units / timing.median for name, timing in timings.items()},
                'seconds': {name: vars(timing) for name, timing in timings.items()},
                'units': units,
                'disturbed': max(timing.elsewhere or 0.0 for timing in timings.values()) > QUIET,
            }
        )

    # Preparation

    async def decoded(self, data: bytes) -> Image.Image:
        return await asyncio.get_running_loop().run_in_executor(None, load, data)

    async def tiles(self, data: bytes) -> None:
        image = await self.decoded(data)
        await asyncio.get_running_loop().run_in_executor(self.prepare, cut, image)

    def measure_preparation(self) -> None:
        for mix in images.MIXES:
            files = images.jpegs(mix, self.arguments.images)
            turns: Turns = {'ours': partial(self.clients, self.tiles, files)}
            if not MISSING:
                check_pixels(self.preparation, files[0])
                turns['LMDeploy'] = partial(self.clients, self.preparation, files)
            self.measure('preparation', mix, turns, len(files), 'images/s')

    def measure_work(self) -> dict[str, Any]:
        """Milliseconds of one core by content and step; images/s by threads, of "mix" and under "varied"."""
        steps = {mix: steps_of(images.jpeg(mix, 0), self.arguments.seconds) for mix in images.CONTENTS}
        return {'milliseconds': steps, **self.measure_threads('mix'), 'varied': self.measure_threads('varied')}

    def measure_threads(self, mix: str) -> dict[str, Any]:
        """Images/s with one thread and with one a core, and what follows for more cores.

        Two threads fall short of twice one's rate by what they cannot do at the same time: work that holds the GIL,
        waiting for it and for memory. More cores do not shrink it, so that all of it counts as serial (Amdahl's law).
        """
        files = images.jpegs(mix, self.arguments.images)
        pools = {threads: ThreadPoolExecutor(threads) for threads in sorted({1, self.threads})}
        turns: Turns = {str(threads): partial(load_and_cut, pool, files) for threads, pool in pools.items()}
        timings = undisturbed(turns, self.arguments.seconds)
        rates = {threads: len(files) / timings[str(threads)].median for threads in pools}
        disturbed = max(timing.elsewhere or 0.0 for timing in timings.values()) > QUIET
        speed_up = rates[self.threads] / rates[1]
        found = {'images_per_second': rates, 'efficiency': speed_up / self.threads, 'disturbed': disturbed}
        if disturbed or self.threads == 1:  # then nothing follows
            return {**found, 'serial': None, 'projected': {}}
        serial = serial_share(speed_up, self.threads)
        cores = [count for count in (4, 8, 16, 32) if count > self.threads]
        return {**found, 'serial': serial, 'projected': {n: rates[1] / (serial + (1 - serial) / n) for n in cores}}

    # Encoding

    def measure_stage(self) -> None:
        pictures = [load(data) for data in images.jpegs('mix', self.arguments.images, (1344, 1344))]
        jobs = [self.job(picture) for picture in pictures]
        tiles = sum(job.grid.tiles for job in jobs)

        def ours() -> None:
            for future in [self.stage.submit([job], COMPRESSION) for job in jobs]:
                future.result()

        turns: Turns = {'ours': ours}
        if not MISSING:
            pixels = [self.preparation.preprocess(picture) for picture in pictures]
            self.check_embeddings(pictures[0], pixels[0])
            turns |= {name: partial(path.encode_all, pixels) for name, path in self.theirs.items()}
        self.measure('stage', f'{len(pictures)} prompts of 10 tiles', turns, tiles, 'tiles/s')

    def job(self, picture: Image.Image) -> ImageJob:
        return ImageJob(picture, Tiling.of(self.encoder.config).grid(picture.size))

    def check_embeddings(self, picture: Image.Image, pixels: torch.Tensor) -> None:
        ours = VisionEncoder(self.encoder).encode([picture], 'none')[0].embeddings.float()
        theirs = self.theirs['LMDeploy, plain'].encode([pixels]).float()
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error <= TOLERANCE[self.device.type], f'embeddings differ from LMDeploy by {error:.1e}'

    async def tokens(self, data: bytes) -> None:
        image = await self.decoded(data)
        await asyncio.wrap_future(self.stage.submit([self.job(image)], COMPRESSION))

    def paths(self) -> dict[str, Callable[[bytes], Awaitable[None]]]:
        """The ways from a file to visual tokens: ours, and LMDeploy's."""

        def through(path: Any) -> Callable[[bytes], Awaitable[None]]:
            async def run(data: bytes) -> None:
                await path(await self.preparation(data))

            return run

        return {'ours': self.tokens, **{name: through(path) for name, path in self.theirs.items()}}

    def measure_end_to_end(self) -> None:
        for mix in images.MIXES:
            files = images.jpegs(mix, self.arguments.images)
            turns: Turns = {name: partial(self.clients, path, files) for name, path in self.paths().items()}
            self.measure('end to end', mix, turns, len(files), 'images/s')

    def measure_latency(self) -> dict[str, Any]:
        """Median and 90th percentile of milliseconds, by side."""
        files = images.jpegs('mix', self.arguments.latencies, LARGE)
        turns = {name: partial(self.client, path) for name, path in self.paths().items()}
        found = {}
        for name, seconds in one_at_a_time(turns, files, warm_up=2).items():
            taken = [1e3 * took for took in seconds]
            p90 = statistics.quantiles(taken, n=10)[-1]
            found[name] = {'median': statistics.median(taken), 'p90': p90, 'samples': taken}
        return found


def serial_share(speed_up: float, threads: int) -> float:
    """The share of the work that two or more threads cannot do side by side, by what they gain over one."""
    return min(1.0, max(0.0, (threads / speed_up - 1) / (threads - 1)))


def cut(image: Image.Image) -> np.ndarray:
    """What the stage does to an image in one of its threads."""
    tiles = cut_tiles(image, *LIMITS)
    tile_digests(tiles)
    return tiles


def load_and_cut(pool: ThreadPoolExecutor, files: Sequence[bytes]) -> None:
    """Prepare pictures by the threads of a pool."""
    list(pool.map(lambda data: cut(load(data)), files))


def check_pixels(preparation: Any, data: bytes) -> None:
    image = preparation.media_io.load_bytes(data)
    tiles = torch.from_numpy(cut(image)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGE_MEAN, IMAGE_STD))
    torch.testing.assert_close((tiles - mean) / std, preparation.pixels(image), rtol=0, atol=1e-6)


def steps_of(data: bytes, seconds: float) -> dict[str, float]:
    """Milliseconds of one thread for each step from a file to tiles."""
    image = load(data)
    columns, _ = choose_grid(*image.size, *LIMITS)
    tiles = cut_tiles(image, *LIMITS)
    grid, thumbnail = tiles[:-1].copy(), tiles[-1:].copy()
    turns: Turns = {
        'decode': lambda: Image.open(BytesIO(data)).load(),
        'load': lambda: load(data),
        'resize': lambda: resize_into_tiles(image, (grid, columns)),
        'thumbnail': lambda: resize_into_tiles(image, (thumbnail, 1)),
        'cut': lambda: cut_tiles(image, *LIMITS),
        'digests': lambda: tile_digests(tiles),
    }
    # The fastest, since what is asked is the work itself and not what neighbours add to it.
    took = {name: timing.fastest * 1e3 for name, timing in undisturbed(turns, seconds / 4).items()}
    return {
        'JPEG decoding (Pillow)': took['decode'],
        "copy in LMDeploy's convert('RGB')": max(0.0, took['load'] - took['decode']),
        'resizing into the grid of tiles': took['resize'],
        'resizing to the thumbnail': took['thumbnail'],
        'the rest of cutting': max(0.0, took['cut'] - took['resize'] - took['thumbnail']),
        'digests of the tiles': took['digests'],
    }


def show_rates(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table('part', 'case', 'unit', 'ours', 'LMDeploy', 'ratio', title='Rates: medians of turns')
    for row in rows:
        rates = row['per_second']
        others = {name: rate for name, rate in rates.items() if name != 'ours'}
        names = {name: name.partition(', ')[2] for name in others}
        table.add_row(
            *(row['part'], row['case'] + (' (disturbed)' if row['disturbed'] else '')),
            *(row['unit'], f'{rates["ours"]:.1f}'),
            ', '.join(f'{names[name]} {rate:.1f}'.strip() for name, rate in others.items()) or 'not here',
            ', '.join(f'{rates["ours"] / rate:.2f}' for rate in others.values()) or '-',
        )
    console.print(table)


def show_work(work: dict[str, Any], console: Console) -> None:
    steps = work['milliseconds']
    table = Table('step', *steps, title='Preparation of one image: milliseconds of one core (fastest turn)')
    totals = {mix: sum(parts.values()) for mix, parts in steps.items()}
    for step in next(iter(steps.values())):
        table.add_row(step, *(f'{parts[step]:.1f} ({parts[step] / totals[mix]:.0%})' for mix, parts in steps.items()))
    table.add_row('together', *(f'{total:.1f}' for total in totals.values()))
    console.print(table)
    for mix, threads in (('mix', work), ('varied', work['varied'])):
        show_threads(mix, threads, console)


def show_threads(mix: str, found: dict[str, Any], console: Console) -> None:
    measured = ', '.join(f'{rate:.1f} with {n} threads' for n, rate in found['images_per_second'].items())
    disturbed = ' (disturbed)' if found['disturbed'] else ''
    console.print(f'Images/s, {mix}{disturbed}: {measured} (efficiency {found["efficiency"]:.2f}).')
    if found['projected']:
        projected = ', '.join(f'{rate:.0f} with {cores}' for cores, rate in found['projected'].items())
        console.print(f'With {found["serial"]:.0%} of a picture done by one thread at a time: {projected} cores.')


def show_latency(latency: dict[str, Any], console: Console) -> None:
    table = Table('', 'median', '90 %', title='One 1792x1344 picture (13 tiles), bytes to visual tokens: milliseconds')
    for name, taken in latency.items():
        table.add_row(name, f'{taken["median"]:.1f}', f'{taken["p90"]:.1f}')
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--like', choices=list(models.SIZES), default='300M' if cuda else 'tiny', help='size of the ViT'
    )
    parser.add_argument('--layers', type=int, help='depth of the ViT, if it shall have fewer layers than that size')
    parser.add_argument('--device', default='cuda' if cuda else 'cpu', help='where both encode (default: %(default)s)')
    parser.add_argument(
        '--images', type=int, default=64 if cuda else 8, help='pictures in each turn of a side (default: %(default)s)'
    )
    parser.add_argument(
        '--latencies', type=int, default=100 if cuda else 12, help='pictures sent one at a time (default: %(default)s)'
    )
    parser.add_argument(
        '--seconds', type=float, default=10.0, help='of timing for each side in each case (default: %(default)s)'
    )
    parser.add_argument(
        '--parts', nargs='+', choices=PARTS, default=PARTS, metavar='PART', help=f'measure only these parts of {PARTS}'
    )
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    console = Console(width=120)
    if MISSING:
        console.print(f'{MISSING}: ours is timed alone.')
    bench = Bench(arguments)
    found: dict[str, Any] = {}
    try:
        for part in arguments.parts:
            console.print(f'==> {part}')
            found[part] = getattr(bench, f'measure_{part.replace(" ", "_")}')()
    except KeyboardInterrupt:
        console.print('Ended before all was measured.', style='red')
    finally:
        bench.close()
    settings = {'like': arguments.like, 'layers': bench.config['vision_config']['num_hidden_layers']}
    settings |= {'threads': bench.threads, 'tile_batch': bench.encoder.tile_batch, 'dtype': str(bench.encoder.dtype)}
    console.rule(f'{facts()["device"]}, ViT {arguments.like} ({settings["layers"]} layers), {bench.threads} threads')
    if bench.rows:
        show_rates(bench.rows, console)
    if found.get('work'):
        show_work(found['work'], console)
    if found.get('latency'):
        show_latency(found['latency'], console)
    if arguments.output:
        content: dict[str, Any] = {
            'facts': facts(),
            'settings': settings,
            'recipe': images.recipe(),
            'rates': bench.rows,
        }
        content |= {part: value for part, value in found.items() if value}
        content['complete'] = set(found) == set(arguments.parts)
        arguments.output.write_text(json.dumps(rounded(content), indent=1) + '\n')
    return 0 if set(found) == set(arguments.parts) else 1


def rounded(value: Any) -> Any:
    """Numbers to five digits, which is more than they are worth."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f'{value:.5g}') if isinstance(value, float) and math.isfinite(value) else value
