"""How many prefill steps a server's engine takes, from LMDeploy's debug log: its metrics do not say."""

import re
from pathlib import Path

DEBUG = ('--log-level', 'DEBUG')  # what a server has to be started with
STEP = re.compile(rb'Sending forward inputs: [^\n]*is_decoding=False')


class PrefillLog:
    """Counts the steps that were started since it was asked last. Their lines are written before anything is answered.

    Args:
        log: what the server and its engine print to.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0

    def taken(self) -> int:
        """Steps since the last call."""
        with self._log.open('rb') as file:
            file.seek(self._read)
            whole_lines, end, _ = file.read().rpartition(b'\n')
        self._read += len(whole_lines) + len(end)
        return len(STEP.findall(whole_lines))
