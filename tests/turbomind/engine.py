"""The stand-in's engine: serves requests side by side, token by token, in a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

logger = logging.getLogger('lmdeploy_vico.stand_in')  # which is shown
INVALID, FINISHED, CANCELED, TOO_LONG = 1, 7, 8, 6  # of ``request.h``
LOGPROBS = 1024  # columns
MOST_TOKENS = 32  # of a list, to stop at or not to generate; the rest is cut off
INPUTS = {'input_ids', 'input_embeddings', 'input_embedding_ranges'}


class InvalidError(Exception):
    """A request that C++ would refuse, or not notice and serve wrongly."""


class Request:
    """A request and what it shares with its client: :meth:`consume` is that of C++'s ``AtomicRequestState``."""

    def __init__(
        self, inputs: dict[str, torch.Tensor], mm_inputs: Any, config: Any, stream: bool, cb: Callable, engine: 'Engine'
    ) -> None:
        self.inputs, self.mm_inputs, self.config = inputs, mm_inputs, config
        self._stream, self._notify = stream, cb
        self.canceled = False
        self._state: SimpleNamespace | None = None
        self._lock = threading.Lock()
        self.metrics = SimpleNamespace(enqueue_time=int(time.time() * 1e6), scheduled_time=0, cached_tokens=0)
        self.length = len(inputs['input_ids'])
        most = min(config.max_new_tokens, engine.context) + 1
        self.outputs = {'output_ids': torch.zeros(engine.context + 1, dtype=torch.int32)}
        if config.output_logprobs:
            self.outputs |= {
                'logprob_vals': torch.full((most, LOGPROBS), -torch.inf),
                'logprob_indexes': torch.zeros(most, LOGPROBS, dtype=torch.int32),
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
        threading.Thread(target=self._serve, name='stand-in-turbomind', daemon=True).start()

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
            embeddings = self._checked(request)
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

    def _checked(self, request: Request) -> torch.Tensor:
        """The embeddings of a prompt, ``[length, H]`` in float32; raises InvalidError."""
        inputs, ids = request.inputs, request.inputs['input_ids']
        vocabulary, hidden = self._embed.weight.shape

        def require(sound: Any, problem: str) -> None:
            if not sound:
                raise InvalidError(problem)

        require(request.mm_inputs is None, 'there is multimodal input')
        require(set(inputs) <= INPUTS, f'unknown inputs {sorted(inputs)}')
        require(ids.ndim == 1 and ids.dtype == torch.int32 and len(ids), 'input_ids are no list of int32')
        require(ids.min() >= 0 and ids.max() < vocabulary, 'an id is outside the vocabulary')
        embeddings = self._embed(ids)
        if set(inputs) & {'input_embeddings', 'input_embedding_ranges'}:
            values, ranges = inputs['input_embeddings'], inputs['input_embedding_ranges']
            require(values.ndim == 2 and values.is_contiguous(), 'embeddings are not one matrix, row after row')
            require(values.dtype == self._dtype, f'embeddings are {values.dtype} in an engine of {self._dtype}')
            require(values.shape[1] == hidden, f'embeddings have {values.shape[1]} values, not {hidden}')
            require(values.isfinite().all(), 'an embedding is not finite')
            require(ranges.ndim == 2 and ranges.shape[1] == 2 and ranges.dtype == torch.int32, 'ranges are not int32')
            offset, last = 0, 0
            for begin, end in ranges.tolist():
                require(begin >= last, 'ranges are not sorted')
                require(begin < end <= len(ids), 'a range is empty or outside the prompt')
                embeddings[begin:end] = values[offset : offset + end - begin].float()
                offset, last = offset + end - begin, end
            require(offset == len(values), 'there are not as many embeddings as their ranges say')
        return embeddings

    def _chosen(self, request: Request, logits: torch.Tensor, count: int, generator: torch.Generator) -> int:
        config = request.config
        assert config.repetition_penalty == 1 and not config.output_logits, 'the stand-in has no such thing'
        logits = logits.clone()
        logits[config.bad_ids[0][:MOST_TOKENS]] = -torch.inf
        if count <= config.min_new_tokens:
            logits[config.eos_ids] = -torch.inf
        if config.output_logprobs:
            values, indices = logits.log_softmax(-1).topk(min(LOGPROBS, len(logits)))
            request.outputs['logprob_vals'][count - 1, : len(values)] = values
            request.outputs['logprob_indexes'][count - 1, : len(values)] = indices.int()
            request.outputs['logprob_nums'][count - 1] = len(values)
        assert config.temperature > 0
        if config.top_k == 1:
            return int(logits.argmax())
        values, indices = logits.topk(config.top_k or len(logits))
        chosen = (values / config.temperature).softmax(-1).multinomial(1, generator=generator)
        return int(indices[chosen])
