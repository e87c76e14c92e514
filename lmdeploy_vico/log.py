"""The plugin's log. Every module logs to ``logging.getLogger(__name__)``; what is shown is set up here, once."""

import logging
import sys

NAME = 'lmdeploy_vico'
_FORMAT = '%(asctime)s - lmdeploy-vico - %(levelname)s - %(message)s'


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
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
