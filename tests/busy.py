"""A pytest plugin: the tests marked ``busy``, many times each, beside processes that keep every core busy.

    python -m pytest -p busy -m busy --times 50 tests

A shared server is started once. A test that takes long has a limit to its rounds of its own, as in
``@pytest.mark.busy(times=15)``. The last lines say how many rounds each test passed.
"""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

SPIN = 'while True: pass'
ROUND = re.compile(r'-?round \d+(?=[\]-])-?')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--times', type=int, default=50, help='rounds of each test marked busy')


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker('busy')
    if marker:
        metafunc.fixturenames.append('busy_round')
        times = min(metafunc.config.getoption('--times'), marker.kwargs.get('times', math.inf))
        metafunc.parametrize('busy_round', range(times), ids=[f'round {number}' for number in range(times)])


@pytest.fixture(scope='session', autouse=True)
def busy_cores() -> Iterator[None]:
    """As many processes that spin, at the priority of the tests, as there are cores."""
    cores = len(os.sched_getaffinity(0))
    spinning = [subprocess.Popen([sys.executable, '-S', '-c', SPIN]) for _ in range(cores)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    for outcome in ('passed', 'failed', 'error', 'skipped'):
        for report in terminalreporter.getreports(outcome):
            name = ROUND.sub('', report.nodeid).replace('[]', '')
            if name != report.nodeid and (report.when == 'call' or outcome != 'passed'):
                rounds[name] += 1
                passed[name] += outcome == 'passed'
    terminalreporter.section('passed beside busy cores')
    for name, count in rounds.items():
        terminalreporter.write_line(f'{passed[name]:4} of {count:<4} {name}')
