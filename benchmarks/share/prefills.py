"""Times prefills of LMDeploy's engine in this process: its scheduler, its kernels, nothing of HTTP.

Prompts are those of ``lmdeploy-vico bench --mode llm``, of the same lengths and with made-up visual tokens, which the
engine gets as spans, as from a server. Two times are taken of each kind of prompts, in turns with all other kinds:

    alone    one prompt at a time, from its hand-over to the engine to its first token
    full     as many prompts at once as fill a few steps, until all have theirs, by their number: what each adds where
             the queue never empties
"""

import asyncio
import contextlib
import logging
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lmdeploy import GenerationConfig, PytorchEngineConfig
from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.disagg.config import EngineRole
from lmdeploy.pytorch.engine import Engine

from benchmarks.share.turns import ALONE, filling
from lmdeploy_vico.adapter.engine.chat_model import VisualTokensMixin
from lmdeploy_vico.adapter.handover import Span
from lmdeploy_vico.adapter.server.prompt import assemble
from lmdeploy_vico.adapter.server.synthetic import SyntheticEncoder, SyntheticImage
from lmdeploy_vico.bench.workload.requests import compressed_tiles
from lmdeploy_vico.planning.constants import BLOCK_TOKENS, MAX_PREFILL_TOKENS, TEMPLATE_TOKENS
from lmdeploy_vico.planning.deployment import Workload

BEFORE = 9  # tokens of the template that stand before the picture
KV_BLOCKS = 1024  # of a rank: several full steps
SESSION = 8192  # tokens of the longest prompt
FIRST_TOKEN = GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)


@dataclass(frozen=True)
class Prompt:
    """Token ids at their true length, and the spans of visual tokens."""

    ids: list[int]
    spans: list[Span]


@dataclass
class Cell:
    """Prompts of one kind, and what was measured of them.

    Attributes:
        work: what they are.
        prompts: as many as fill the steps.
        alone: seconds of each prompt that came alone.
        full: seconds of each turn with all prompts, by their number.
        steps: tokens of every prefill step of the last such turn.
    """

    work: Workload
    prompts: list[Prompt]
    alone: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> float:
        """Tokens of a prompt, on average."""
        return statistics.mean(len(prompt.ids) for prompt in self.prompts)


def make_cell(work: Workload, steps: int, encoder: SyntheticEncoder, vocabulary: int) -> Cell:
    """Return a cell whose prompts fill ``steps`` prefill steps, with random texts of ids below ``vocabulary``."""
    return Cell(work, [_prompt(work, index, encoder, vocabulary) for index in range(filling(work, steps))])


def _prompt(work: Workload, index: int, encoder: SyntheticEncoder, vocabulary: int) -> Prompt:
    draw = random.Random(f'{work} {index}')
    text = [draw.randrange(vocabulary) for _ in range(work.text_tokens + TEMPLATE_TOKENS)]
    compressed = compressed_tiles(work.compression, work.tiles, index)
    image = encoder.encode(SyntheticImage(work.tiles, compressed, seed=draw.randrange(2**32)))
    return Prompt(*assemble([text[:BEFORE], text[BEFORE:]], [image], image_token_id=0, block_size=BLOCK_TOKENS))


@contextlib.contextmanager
def _recorded_steps() -> Iterator[list[int]]:
    """Record the tokens of the engine's prefill steps; nothing waits for the device."""
    prepare = VisualTokensMixin.prepare_inputs_for_generation
    steps: list[int] = []

    def record(self: Any, past_key_values: Any, inputs_embeds: Any = None, context: Any = None) -> Any:
        if not context.is_decoding and not context.is_dummy:
            steps.append(context.input_ids.shape[-1])
        return prepare(self, past_key_values, inputs_embeds=inputs_embeds, context=context)

    with mock.patch.object(VisualTokensMixin, 'prepare_inputs_for_generation', record):
        yield steps


class Prefills:
    """An engine that is asked for first tokens.

    Args:
        checkpoint: a directory; weights are made up on the device, whether it has any or not.
        most: prompts at a time.
    """

    def __init__(self, checkpoint: Path, most: int) -> None:
        logging.getLogger('lmdeploy').setLevel(logging.WARNING)
        config = PytorchEngineConfig(
            session_len=SESSION,
            max_prefill_token_num=MAX_PREFILL_TOKENS,
            block_size=BLOCK_TOKENS,
            num_gpu_blocks=KV_BLOCKS,
            max_batch_size=most,
            role=EngineRole.Prefill,  # any other decodes once more while the first token is on its way
            hf_overrides={'vico': {'dummy_weights': True}},
        )
        self._engine = Engine.from_pretrained(str(checkpoint), engine_config=config)
        self._sessions = iter(range(1, 2**31))

    @property
    def dtype(self) -> Any:
        """The language model's, a ``torch.dtype``."""
        return self._engine.model_config.dtype

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine's loop."""
        self._engine.start_loop()
        try:
            yield
        finally:
            self._engine.close()
            with contextlib.suppress(asyncio.CancelledError):
                await self._engine.wait_tasks()

    async def seconds(self, prompts: Sequence[Prompt]) -> float:
        """Send prompts at once; return the seconds until all have their first token.

        Raises:
            RuntimeError: the engine has answered one with anything else.
        """
        instances = [self._engine.create_instance() for _ in prompts]
        begun = time.perf_counter()
        await asyncio.gather(*map(self._first_token, instances, prompts))
        return time.perf_counter() - begun

    async def _first_token(self, instance: Any, prompt: Prompt) -> None:
        answer = instance.async_stream_infer(
            next(self._sessions), prompt.ids, gen_config=FIRST_TOKEN, multimodal=prompt.spans
        )
        tokens = 0
        async for output in answer:
            if output.status not in (ResponseType.SUCCESS, ResponseType.FINISH):
                raise RuntimeError(f'The engine answered a prompt of {len(prompt.ids)} tokens with {output.status}.')
            tokens += len(output.token_ids)
        if tokens != 1:
            raise RuntimeError(f'The engine answered a prompt with {tokens} tokens instead of one.')


async def measure(prefills: Prefills, cells: Sequence[Cell], rounds: int, done: Callable[[int], object]) -> None:
    """Fill the cells, in turns.

    Args:
        rounds: that count; one more comes first, to warm up.
        done: called after each round with how many count so far.
    """
    with _recorded_steps() as steps:
        async with prefills.running():
            for number in range(rounds + 1):
                shift = number % len(cells)
                for cell in [*cells[shift:], *cells[:shift]]:
                    alone = [await prefills.seconds([prompt]) for prompt in cell.prompts[:ALONE]]
                    steps.clear()
                    full = await prefills.seconds(cell.prompts) / len(cell.prompts)
                    if number:
                        cell.alone += alone
                        cell.full.append(full)
                        cell.steps = list(steps)
                done(number)
