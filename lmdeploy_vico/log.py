"""The plugin's logger: its few start-up lines are shown even where LMDeploy's own log is set to errors only."""

import logging
import sys

NAME = 'lmdeploy_vico'
_FORMAT = '%(asctime)s - %(name)s - %(levelname)s - %(message)s'


def get_logger() -> logging.Logger:
    """The logger ``lmdeploy_vico``; writes to stderr at INFO unless the program has configured logging itself."""
    logger = logging.getLogger(NAME)
    if not logger.hasHandlers() and logger.level == logging.NOTSET:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
