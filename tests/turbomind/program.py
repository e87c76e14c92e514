"""Programs that find the stand-in in the place of TurboMind's binding, which the process of the tests does not have."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from waiting import HANG

SITE = Path(__file__).parent / 'site'


def run(code: str, *arguments: object) -> str:
    """Return the last line that a program prints."""
    path = os.pathsep.join([str(SITE), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': path, 'LMDEPLOY_VICO_LANGUAGE_ENGINE': 'turbomind'}
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]  # LMDeploy may log before
