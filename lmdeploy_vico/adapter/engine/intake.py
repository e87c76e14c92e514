"""What the engine does with a request that it cannot take: that request fails, and no other.

The API process checks what it hands over, so nothing should fail here. Without this, whatever does would end the loop
that serves everybody.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lmdeploy.messages import ResponseType

from lmdeploy_vico.adapter.engine.ranks import runs_vico

logger = logging.getLogger(__name__)

_explained: set[str] = set()  # errors that have been logged with their traceback


def serves_vico(engine: Any) -> bool:
    """Return whether an engine of LMDeploy's runs the language model of a ViCO checkpoint."""
    return runs_vico(engine.executor.model_config)


def add_each(engine: Any, requests: Sequence[Any], add: Callable[[list[Any]], None]) -> None:
    """Add requests one by one, and fail those that raise.

    Args:
        engine: LMDeploy's.
        requests: that ask it to generate.
        add: LMDeploy's own function, for a list of them.
    """
    for request in requests:
        try:
            if _leaves_no_room(engine, request):
                engine._response(request.resp, ResponseType.INPUT_LENGTH_ERROR)
                continue
            add([request])
            _try_sampling(engine, request)
        except Exception as error:
            _log(error)
            _fail(engine, request)


def _leaves_no_room(engine: Any, request: Any) -> bool:
    """Return whether a prompt fills all of the context, or of the KV cache, and asks for more.

    LMDeploy takes one that is just as long, and lowers what it asks for to nothing. The sequence is then scheduled for
    a step that it has no block for.
    """
    full = len(request.data['token_ids']) >= engine.max_session_len
    return full and request.data['sampling_param'].max_new_tokens > 0


def _try_sampling(engine: Any, request: Any) -> None:
    """Make what a batch needs of each request, for this one alone: what cannot be made ends the engine in a batch."""
    session = engine.scheduler.get_session(request.data['session_id'])
    sequences = list(session.sequences.values()) if session is not None else []
    if sequences:
        strategy = copy.copy(engine.sampling_strategy)
        strategy.session_to_cleanup = []  # which the batches have to see
        strategy.make_sampling_inputs(sequences)
        engine.model_agent_strategy.make_stopping_criteria(sequences)


def _fail(engine: Any, request: Any) -> None:
    engine.end_session(request.data['session_id'])
    engine._response(request.resp, ResponseType.INTERNAL_ENGINE_ERROR)


def _log(error: Exception) -> None:
    kind = f'{type(error).__name__}: {error}'[:200]
    first = kind not in _explained
    if len(_explained) < 100:  # the texts may be of clients' making
        _explained.add(kind)
    logger.error('A request could not be added to the engine: %s', kind, exc_info=error if first else None)
