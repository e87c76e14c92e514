"""The stand-in's engine: serves requests side by side, token by token, in a thread of its own."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache
from turbomind.guided import Guidance
from turbomind.inputs import InvalidError, embedded
from turbomind.sampling import COLUMNS, keep, log_probabilities

logger = logging.getLogger('lmdeploy_vico.stand_in')  # which is shown
INVALID, FINISHED, CANCELED, TOO_LONG = 1, 7, 8, 6  # of ``request.h``
MOST_TOKENS = 32  # of a list, to stop at or not to generate; the rest is cut off


class Request:
    """A request and what it shares with its client: :meth:`consume` is that of C++'s ``AtomicRequestState``."""

    def __init__(
        self,
        inputs: dict[str, torch.Tensor],
        mm_inputs: Any,
        config: Any,
        stream: bool,
        cb: Callable,
        engine: 'Engine',
        grammar: Any,
    ) -> None:
        self.inputs, self.mm_inputs, self.config = inputs, mm_inputs, config
        self._stream, self._notify = stream, cb
        self.guidance = None if grammar is None else Guidance(grammar)
        self.canceled = False
        self._state: SimpleNamespace | None = None
        self._lock = threading.Lock()
        self.metrics = SimpleNamespace(enqueue_time=int(time.time() * 1e6), scheduled_time=0, cached_tokens=0)
        self.length = len(inputs['input_ids'])
        most = min(config.max_new_tokens, engine.context) + 1
        self.outputs = {'output_ids': torch.zeros(engine.context + 1, dtype=torch.int32)}
        if config.output_logprobs:
            self.outputs |= {
                'logprob_vals': torch.full((most, COLUMNS), -torch.inf),
                'logprob_indexes': torch.zeros(most, COLUMNS, dtype=torch.int32),
                'logprob_nums': torch.zeros(most, dtype=torch.int32),
            }

    def consume(self) -> SimpleNamespace | None:
        return self._exchange(None)

    def update(self, status: int, length: int) -> None:
        """Tell the client, who is not told again before it has looked."""
        seen = (status or self._stream) and self._exchange(SimpleNamespace(status=status, seq_len=length)) is None
        if seen:
            self._notify()

    def _exchange(self, state: SimpleNamespace | None) -> SimpleNamespace | None:
        with self._lock:
            before, self._state = self._state, state
        return before


class Engine:
    """Serves requests with a model of ``transformers``.

    Args:
        model: computes in float32.
        dtype: in which embeddings have to come.
        context: tokens of a sequence, at most.
    """

    def __init__(self, model: Any, dtype: torch.dtype, context: int) -> None:
        self._model, self._dtype, self.context = model, dtype, context
        self._embed = model.get_input_embeddings()
        self._added: Queue[Request] = Queue()
        self._active: list[tuple[Request, Iterator[bool]]] = []
        self._ticks = 0
        threading.Thread(target=self._run, name='stand-in-turbomind', daemon=True).start()

    def add(self, request: Request) -> None:
        self._added.put(request)

    def metrics(self) -> SimpleNamespace:
        return SimpleNamespace(
            active_seqs=len(self._active),
            waiting_seqs=self._added.qsize(),
            cache_usage=0.0,
            prefix_cache_hit_rate=0.0,
            scheduler_tick=self._ticks,
        )

    def _run(self) -> None:
        """Serve until the process ends; as in C++, nothing catches what is thrown."""
        try:
            self._serve()
        except BaseException:
            logger.exception('terminate called in the thread of the engine')
            os.abort()

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with suppress(Empty):
                while True:
                    request = self._added.get(block=not self._active)
                    self._active.append((request, self._steps(request)))
            self._ticks += 1
            self._active = [(request, steps) for request, steps in self._active if next(steps)]

    def _steps(self, request: Request) -> Iterator[bool]:
        """One token after the other; the last thing that is yielded is False."""
        try:
            embeddings = embedded(request.inputs, request.mm_inputs, self._embed, self._dtype)
        except InvalidError as error:
            logger.error('invalid request: %s', error)
            request.update(INVALID, request.length)
            yield False
            return
        if request.length >= self.context:
            request.update(TOO_LONG, request.length)
            yield False
            return
        request.metrics.scheduled_time = int(time.time() * 1e6)
        config, output, length = request.config, request.outputs['output_ids'], request.length
        output[:length] = request.inputs['input_ids']
        cache, generator = DynamicCache(), torch.Generator().manual_seed(config.random_seed % 2**63)
        most = min(config.max_new_tokens, self.context - length)
        for count in range(1, most + 1):
            if request.canceled:
                logger.info('canceled after %d of %d tokens', count - 1, most)
                request.update(CANCELED, length + count - 1)
                yield False
                return
            answer = self._model(inputs_embeds=embeddings[None], cache=cache, logits_to_keep=1)
            token = self._chosen(request, answer.logits[0, -1], count, generator)
            output[length + count - 1] = token
            embeddings = self._embed(torch.tensor([token]))
            ended = token in config.stop_ids[0][:MOST_TOKENS] or count == most
            request.update(FINISHED if ended else 0, length + count)
            yield not ended
            if ended:
                return

    def _chosen(self, request: Request, logits: torch.Tensor, count: int, generator: torch.Generator) -> int:
        config = request.config
        assert config.repetition_penalty == 1 and not config.output_logits, 'the stand-in has no such thing'
        logits = logits.clone()
        logits[config.bad_ids[0][:MOST_TOKENS]] = -torch.inf
        if count <= config.min_new_tokens:
            logits[config.eos_ids] = -torch.inf
        if request.guidance:
            request.guidance.forbid(logits)
        kept = keep(logits, config)
        place = int(kept.probabilities.multinomial(1, generator=generator))
        if config.output_logprobs:
            values, ids = log_probabilities(kept, place)
            request.outputs['logprob_vals'][count - 1, : len(values)] = values
            request.outputs['logprob_indexes'][count - 1, : len(values)] = ids.int()
            request.outputs['logprob_nums'][count - 1] = len(values)
        token = int(kept.ids[place])
        if request.guidance:
            request.guidance.accept(token)
        return token
