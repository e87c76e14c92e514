"""What a few requests make the plugin and LMDeploy's engine do, counted: the same numbers on every machine.

Requests are sent one after another to an engine in this process, which serves a tiny checkpoint on the CPU with small
prefills, prefix caching and a cache of tiles. For each of them:

  prompt_tokens, visual_tokens     what it is billed for
  prefilled_tokens, prefill_steps  what of it the prefix cache did not have, and in how many forwards that was computed
  kv_blocks                        blocks of 64 tokens that hold its prompt
  tiles_compressed, tiles_full     tiles of 64 and of 256 visual tokens
  tiles_encoded, device_batches    what of them the cache of tiles did not have, and in how many batches that went
  encoding_operators, projecting_operators   calls of torch operators that compute, by the vision side; on a CUDA device
                                   each is a launch, or a node of the graph
  kernel_operations                calls of the operations under kernels/, by the vision side and by the engine
  kernel_launches                  Triton launches that these calls would have been: an operation may take several

They are compared exactly with benchmarks/results/counters.json. A change that has good reason to change a number
commits the new file along with it.

    make counters                    # compare
    make counters ARGS=--update      # write the file
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from prometheus_client import REGISTRY
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import RESULTS
from benchmarks.lib import compare
from benchmarks.lib.compare import Difference
from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE
from lmdeploy_vico.kernels import attention_pool, linear, pack, pixel_shuffle

COMMITTED = RESULTS / 'counters.json'
TILE_BATCH = 4  # as on a GPU, several tiles share a batch
MAX_PREFILL_TOKENS = 512  # of one prefill step
KV_BLOCK = 64
KERNELS = {'attention_pool': attention_pool, 'linear': linear, 'pixel_shuffle': pixel_shuffle, 'pack': pack}
OPERATORS = ('encoding_operators', 'projecting_operators')  # these depend on torch's version

Counters = dict[str, int]
Counts = dict[str, Any]  # what the file holds: versions, and "requests" with their counters


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth on the left and noise on the right, so that the router has no close decisions to take."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = Image.fromarray(rng.integers(64, 192, (3, 3, 3), dtype=np.uint8)).resize((width // 2, height))
    noise[:, : width // 2] = np.asarray(smooth)
    return Image.fromarray(noise)


def requests() -> dict[str, list[Any]]:
    """The contents of the requests by name: texts and pictures, some with a compression of their own.

    Only pictures whose tiles fill whole batches share a request: how the others' tiles fall into batches depends on
    which picture is cut first.
    """
    first = picture(1, 900, 600)  # 3 x 2 tiles and a thumbnail
    question = 'What is in this picture?'
    return {
        'text only': ['Tell me about lighthouses.'],
        'one picture': [first, question],
        'the same again': [first, question],
        'the same, uncompressed': [(first, 'none'), question],
        'two pictures': ['Compare ', picture(2, 300, 100), ' with ', picture(3, 700, 100)],  # 3 and 7 tiles, thumbnails
        'half compressed': [(picture(4, 1000, 1000), 0.5), 'Describe.'],  # 10 tiles
        'all compressed': [(picture(5, 500, 1000), 'all'), 'Transcribe.'],
    }


def message(content: Sequence[Any]) -> list[dict[str, Any]]:
    """A conversation of one message, as a pipeline takes it."""
    items: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            items.append({'type': 'text', 'text': part})
        else:
            image, compression = part if isinstance(part, tuple) else (part, None)
            url: dict[str, Any] = {'url': image} | ({} if compression is None else {'compression': compression})
            items.append({'type': 'image_url', 'image_url': url})
    return [{'role': 'user', 'content': items}]


class Operators(TorchDispatchMode):
    """Counts the torch operators that this thread calls meanwhile; views and bare allocations compute nothing."""

    ALLOCATIONS = ('aten::empty', 'aten::new_empty', 'aten::_unsafe_view', 'aten::lift_fresh')

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # an operator that is made of others counts as these
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self.count += not (func.is_view or func.name().startswith(self.ALLOCATIONS))
        return func(*args, **kwargs)


@contextmanager
def counted_operators(encoder: Any) -> Iterator[Counters]:
    """Count what an encoder's batches and projections call, in whichever thread that runs."""
    counts = dict.fromkeys(OPERATORS, 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Operators() as operators:
                result = function(*args, **kwargs)
            counts[name] += operators.count
            return result

        return run

    with (
        mock.patch.object(encoder, 'start', counting(OPERATORS[0], encoder.start)),
        mock.patch.object(encoder, 'visual_tokens', counting(OPERATORS[1], encoder.visual_tokens)),
    ):
        yield counts


class Launches:
    """Stands in for a Triton kernel: counts launches, and launches nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, **arguments: Any) -> None:
        self.count += 1


@contextmanager
def counted_kernels() -> Iterator[Counters]:
    """Count calls of the operations under kernels/, whoever makes them, and the Triton launches of each.

    Without a GPU it is their torch reference that runs. Beside it runs what would launch the Triton kernels, with these
    replaced: shapes alone decide about launches, given a device (``device_limits`` makes one up where there is no GPU).
    """
    counts = {'kernel_operations': 0, 'kernel_launches': 0}
    lock, launches = threading.Lock(), Launches()

    def counting(reference: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with lock, _disable_current_modes():
                before = launches.count
                launch(*args, **kwargs)
                counts['kernel_operations'] += 1
                counts['kernel_launches'] += launches.count - before
            return reference(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for name, module in KERNELS.items():
            for kernel in [name for name in vars(module) if name.endswith('_kernel')]:
                stack.enter_context(mock.patch.object(module, kernel, launches))
            reference, launch = f'{name}_torch', getattr(module, f'{name}_triton')
            stack.enter_context(mock.patch.object(module, reference, counting(getattr(module, reference), launch)))
        yield counts


class Prefill(NamedTuple):
    """One forward of the language model: new tokens, and KV blocks that its sequence has."""

    tokens: int
    blocks: int


@contextmanager
def recorded_prefills() -> Iterator[list[Prefill]]:
    """Record the engine's prefills, those of this process."""
    from lmdeploy_vico.adapter.engine.chat_model import VisualTokensMixin

    prepare = VisualTokensMixin.prepare_inputs_for_generation
    prefills: list[Prefill] = []

    def record(self: Any, past_key_values: Any, inputs_embeds: Any = None, context: Any = None) -> Any:
        if not context.is_decoding and not context.is_dummy:
            prefills.append(Prefill(int(context.q_seqlens.sum()), -(-int(context.kv_seqlens.max()) // KV_BLOCK)))
        return prepare(self, past_key_values, inputs_embeds=inputs_embeds, context=context)

    with mock.patch.object(VisualTokensMixin, 'prepare_inputs_for_generation', record):
        yield prefills


def stage_counters() -> Counters:
    """What the vision stage's own metrics say so far."""
    names = {
        'visual_tokens': ('vico:visual_tokens_total', {}),
        'tiles_compressed': ('vico:tiles_total', {'resolution': 'compressed'}),
        'tiles_full': ('vico:tiles_total', {'resolution': 'full'}),
        'tiles_encoded': ('vico:encoder_tiles_per_batch_sum', {}),
        'device_batches': ('vico:encoder_tiles_per_batch_count', {}),
    }
    return {name: int(REGISTRY.get_sample_value(metric, labels) or 0) for name, (metric, labels) in names.items()}


def measure(checkpoint: Path) -> Counts:
    """Send the requests to an engine in this process; all counters of each, by name."""
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    config = PytorchEngineConfig(
        **TINY_ENGINE,
        session_len=8192,
        max_prefill_token_num=MAX_PREFILL_TOKENS,
        enable_prefix_caching=True,
        # Said here, since the environment may set others.
        hf_overrides={'vico': {'tile_batch': TILE_BATCH, 'cache_bytes': 1 << 28, 'compression': 'auto'}},
    )
    first_token = GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)
    found = {}
    with recorded_prefills() as prefills, pipeline(str(checkpoint), backend_config=config) as pipe:
        encoder = pipe.async_engine.vl_encoder.model.stage._encoders[0]
        for name, content in requests().items():
            prefills.clear()
            before = stage_counters()
            with counted_operators(encoder) as operators, counted_kernels() as kernels:
                [answer] = pipe([message(content)], gen_config=first_token)
            added = {counter: value - before[counter] for counter, value in stage_counters().items()}
            found[name] = {
                'prompt_tokens': answer.input_token_len,
                'visual_tokens': added.pop('visual_tokens'),
                'prefilled_tokens': sum(prefill.tokens for prefill in prefills),
                'prefill_steps': len(prefills),
                'kv_blocks': max(prefill.blocks for prefill in prefills),
                **added,
                **operators,
                **kernels,
            }
    # The build of torch, after the plus sign, does not matter.
    return {'lmdeploy': version('lmdeploy'), 'torch': version('torch').partition('+')[0], 'requests': found}


def differences(was: Counts, now: Counts) -> list[Difference]:
    """Return every counter that is not the same, leaving out :data:`OPERATORS` if torch's version is not."""
    left_out = () if was['torch'] == now['torch'] else OPERATORS
    return compare.differences(was['requests'], now['requests'], left_out)


def report(was: Counts, now: Counts, console: Console) -> bool:
    """Say what has changed; returns whether anything has."""
    found = differences(was, now)
    if was['torch'] != now['torch']:
        console.print(f'Operators were counted with torch {was["torch"]}, not {now["torch"]}: they are not compared.')
    if found:
        table = Table('counter', 'request', 'was', 'is', title='Counters that have changed')
        for row in found:
            table.add_row(*('-' if value is None else str(value) for value in row))
        console.print(table)
        console.print('If that is meant, commit the new numbers with the change: make counters ARGS=--update')
    else:
        console.print(f'The counters of {len(now["requests"])} requests are as before.')
    return bool(found)


def show(counts: Mapping[str, Any], console: Console) -> None:
    """Print all counters."""
    names = list(counts['requests'])
    table = Table('', *names, title='Counters by request')
    for counter in counts['requests'][names[0]]:
        table.add_row(counter, *(str(counts['requests'][name][counter]) for name in names))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--update', action='store_true', help=f'write {COMMITTED.name} instead of comparing with it')
    parser.add_argument('--output', type=Path, help='also write the counters, as JSON, to this file')
    arguments = parser.parse_args(argv)
    if torch.cuda.is_available():
        parser.error('The counters are those of a CPU: set CUDA_VISIBLE_DEVICES= in the environment.')
    from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint

    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        counts = measure(make_tiny_checkpoint(Path(folder) / 'tiny'))
    show(counts, console)
    text = json.dumps(counts, indent=1) + '\n'
    if arguments.output:
        arguments.output.write_text(text)
    if arguments.update:
        COMMITTED.write_text(text)
        return 0
    return int(report(json.loads(COMMITTED.read_text()), counts, console))
