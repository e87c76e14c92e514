"""The plugin's log. Every module logs to ``logging.getLogger(__name__)``; what is shown is set up here, once.

A line about a request begins with the id of the request in brackets.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NAME = 'lmdeploy_vico'
_FORMAT = '%(asctime)s - lmdeploy-vico - %(levelname)s - %(message)s'

request_id: ContextVar[str] = ContextVar('vico_request_id', default='')  # of the request that is served, '' for none


@contextmanager
def about(request: str) -> Iterator[None]:
    """What is logged inside, in a thread that works for many requests, is about this one."""
    token = request_id.set(request)
    try:
        yield
    finally:
        request_id.reset(token)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        request = request_id.get()
        if request:
            record.message = f'[{request}] {record.message}'
        return super().formatMessage(record)


def setup() -> None:
    """Show the plugin's log on stderr from INFO on, unless the program has configured logging itself.

    Called where a process first handles a ViCO checkpoint: where the config is read, and, in the engine's processes,
    where the model is made. Also where the CPU backend, which serves any model, says that it does. The few start-up
    lines are then shown even where LMDeploy's own log is set to errors only.
    """
    logger = logging.getLogger(NAME)
    if logger.hasHandlers() or logger.level != logging.NOTSET:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(_FORMAT))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
