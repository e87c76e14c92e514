"""The ``lmdeploy`` command, with the engine in the API server's own process: a placement that placement.py measures.

    python -m benchmarks one-process serve api_server DIR

``api_server`` itself always starts a process for the engine.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lmdeploy.cli import run
from lmdeploy.pytorch.engine import Engine


def keep_engine_here() -> None:
    """Have LMDeploy's engine built in the process that asks for it."""
    build = Engine.from_pretrained

    def from_pretrained(*arguments: Any, engine_config: Any = None, **options: Any) -> Any:
        if engine_config is not None:
            engine_config.enable_mp_engine = False
        return build(*arguments, engine_config=engine_config, **options)

    Engine.from_pretrained = from_pretrained


def main(argv: Sequence[str] | None = None) -> int:
    """Run LMDeploy's command line with these arguments."""
    keep_engine_here()
    if argv is not None:
        sys.argv[1:] = argv
    run()
    return 0
