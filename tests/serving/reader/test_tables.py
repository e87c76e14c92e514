"""Holds the shipped reader to the committed tables, through one server; minutes: ``make test-reader``."""

import json

import pytest
from rich.console import Console

from benchmarks.reader.asking import Client, everywhere
from benchmarks.reader.report import TITLES
from benchmarks.reader.run import RESULTS, SETS, documents, lots, marks
from benchmarks.reader.statistics import Resampling, right

pytestmark = [pytest.mark.quality, pytest.mark.server]

QUESTIONS = 300
OTHERS = 6  # of these may be answered otherwise than in the committed results


@pytest.fixture(scope='module')
def committed():
    return json.loads(RESULTS.read_text())['hits']


@pytest.fixture(scope='module')
def client(reader, tmp_path_factory):
    from lmdeploy_vico.launch import ApiServer

    folder = tmp_path_factory.mktemp('tables')
    scratch = folder / 'answers'
    scratch.mkdir()
    with ApiServer(reader, log=folder / 'log') as server:
        yield Client(server, Console(quiet=True), scratch)


@pytest.mark.parametrize('name', TITLES)
def test_the_committed_answers(client, committed, tmp_path, name):
    """The same questions are answered rightly, and wrongly: another processor may round a near tie otherwise."""
    data = documents(tmp_path, name, SETS[name], QUESTIONS)
    answers = client.ask(data, everywhere(data, 'none', 'auto', 'all'))
    for way, given in answers.items():
        found, expected = marks(data.questions, given), committed[name][way][:QUESTIONS]
        others = sum(one != other for one, other in zip(found, expected, strict=True))
        assert others <= OTHERS, (name, way, others)


def test_the_router_is_better_than_lots(client, tmp_path):
    data = documents(tmp_path, 'several tiles', SETS['several tiles'], QUESTIONS)
    answers = client.ask(data, everywhere(data, 'none', 'auto'))
    answers |= client.ask(data, {'random': lots(data, answers)})
    better = right(data.questions, answers['auto']) - right(data.questions, answers['random'])
    assert Resampling(data.questions).mean(better).low > 0
