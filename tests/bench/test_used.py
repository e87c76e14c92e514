"""The processor time of a server: of its own process and of those that it has started, and of no other."""

import subprocess
import sys

import pytest
from waiting import HANG

from lmdeploy_vico.bench.used import processor_seconds

# A process whose child computes for two tenths of a second, while it waits itself; it ends with its standard input.
PARENT = """
import subprocess, sys
spin = 'import sys, time\\nwhile time.process_time() < 0.2: pass\\nprint(1, flush=True)\\nsys.stdin.read()'
child = subprocess.Popen([sys.executable, '-S', '-c', spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print('done', flush=True)
sys.stdin.read()
child.stdin.close()
child.wait()
"""


class Server:
    """As much of a server as is looked at."""

    def __init__(self, process):
        self.pid, self.alive = process.pid, lambda: process.poll() is None


def test_processor_time_is_counted_by_process():
    command = [sys.executable, '-S', '-c', PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'done\n'
        used = processor_seconds(Server(process))
        again = processor_seconds(Server(process))
        process.stdin.close()
        process.wait(HANG)
    assert used['engine'] >= 0.19, 'the kernel counts in hundredths'
    assert again['api'] >= used['api'] >= 0 and again['engine'] == pytest.approx(used['engine'], abs=0.02)
    assert processor_seconds(Server(process)) == {}, 'one that has ended'
    assert processor_seconds(None) == {}, 'one elsewhere'
