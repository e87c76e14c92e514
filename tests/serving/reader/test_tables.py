"""Holds the shipped reader to the committed tables, through one server; minutes: ``make test-reader``."""

import json

import pytest
from rich.console import Console

from benchmarks.reader.asking import Client, everywhere
from benchmarks.reader.report import TITLES
from benchmarks.reader.run import RESULTS, SETS, documents, lots, table
from benchmarks.reader.statistics import Resampling, right

pytestmark = [pytest.mark.quality, pytest.mark.server]

QUESTIONS = 300


@pytest.fixture(scope='module')
def committed():
    return json.loads(RESULTS.read_text())['tables']


@pytest.fixture(scope='module')
def client(reader, tmp_path_factory):
    from lmdeploy_vico.launch import ApiServer

    folder = tmp_path_factory.mktemp('tables')
    scratch = folder / 'answers'
    scratch.mkdir()
    with ApiServer(reader, log=folder / 'log') as server:
        yield Client(server, Console(quiet=True), scratch)


@pytest.mark.parametrize('name', TITLES)
def test_a_table(client, committed, tmp_path, name):
    """Every share of right answers lies in the committed interval, widened for the smaller number of questions."""
    data = documents(tmp_path, name, SETS[name], QUESTIONS)
    found = table(data.questions, client.ask(data, everywhere(data, 'none', 'auto', 'all')))
    for kind, lines in found.items():
        for way, line in lines.items():
            value, low, high = committed[name][kind][way]['right']
            _, own_low, own_high = line['right']
            assert own_low <= high and low <= own_high, (name, kind, way, line['right'], value)


def test_the_router_is_better_than_lots(client, tmp_path):
    data = documents(tmp_path, 'several tiles', SETS['several tiles'], QUESTIONS)
    answers = client.ask(data, everywhere(data, 'none', 'auto'))
    answers |= client.ask(data, {'random': lots(data, answers)})
    better = right(data.questions, answers['auto']) - right(data.questions, answers['random'])
    assert Resampling(data.questions).mean(better).low > 0
