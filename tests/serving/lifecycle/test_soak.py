"""``benchmarks/serving/soak.py``: a short run of it passes, and it notices wrong answers, lost ones, and growth."""

import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import HANG

from benchmarks.serving.answers import Answer, gap
from benchmarks.serving.growth import Sampler

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


def soak(*arguments):
    command = [sys.executable, '-m', 'benchmarks', 'soak', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)


@pytest.mark.long
@pytest.mark.server
def test_every_answer_is_right(tmp_path):
    output = tmp_path / 'soak.json'
    done = soak('--requests', 100, '--output-file', output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith('every answer right, too short a run to say whether anything grew.\n')
    result = json.loads(output.read_text())
    assert result['cancelled'] > 0 and result['answered'] + result['cancelled'] == 100
    assert result['different_answers'] == result['prompts'] > 50
    assert all(quarter['uss'] > 100 * MIB for quarter in result['medians_by_quarter'])


# --- near ties --------------------------------------------------------------------------------------------------------


def answered(*places, prompt_tokens=9):
    """An answer whose places are (id, log-probabilities by token); the first token is the one that was taken."""
    content = [
        {
            'token': next(iter(tops)),
            'logprob': next(iter(tops.values())),
            'top_logprobs': [{'token': token, 'logprob': value} for token, value in list(tops.items())[1:]],
        }
        for _, tops in places
    ]
    choice = {'output_ids': [one for one, _ in places], 'logprobs': {'content': content} if content else None}
    return Answer.of({'choices': [choice], 'usage': {'prompt_tokens': prompt_tokens}})


FIRST, SURE = (1, {'a': -0.1, 'b': -3.0}), (7, {'x': -0.5, 'y': -1.5})


@pytest.mark.parametrize(
    ('alone', 'apart'),
    [
        ([FIRST, (2, {'b': -1.0, 'c': -1.01}), SURE], 0.0),
        ([FIRST, (3, {'c': -1.0, 'b': -1.004}), (8, {'z': 0.0})], 0.01),  # what follows is another answer
        ([FIRST, (3, {'c': -1.0, 'b': -1.3}), SURE], 0.3),
        ([FIRST, (4, {'d': -1.0, 'b': -1.0}), SURE], float('inf')),  # the other answer does not know the token
        ([(2, {'b': -0.1, 'a': -3.0}), (2, {'b': -1.0, 'c': -1.01}), SURE], 2.9),  # the first difference counts
        ([FIRST, (2, {'b': -1.0})], float('inf')),  # shorter
    ],
)
def test_how_far_two_answers_are_apart(alone, apart):
    company = answered(FIRST, (2, {'b': -1.0, 'c': -1.01}), SURE)
    assert gap(company, answered(*alone)) == gap(answered(*alone), company)
    assert gap(company, answered(*alone)) == pytest.approx(apart)


def test_without_probabilities_or_with_another_prompt_nothing_is_a_near_tie():
    one, other = Answer((1, 2), 9), Answer((1, 3), 9)
    assert gap(one, one) == 0 and gap(one, other) == float('inf')
    near = answered((1, {'a': -1.0, 'b': -1.0}))
    assert gap(near, answered((1, {'a': -1.0, 'b': -1.0}), prompt_tokens=10)) == float('inf')


# --- wrong answers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def impostor():
    """``impostor(reply)``: the URL of a server whose i-th answer is the status ``reply(i)`` and i."""
    servers = []

    def start(reply):
        numbers = itertools.count()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self):
                name = 'vico:encoder_queue_wait_seconds'
                self.send(
                    200, f'{name}_sum 0\n{name}_count 0\n' if 'metrics' in self.path else '{"data": [{"id": "x"}]}'
                )

            def do_POST(self):
                self.rfile.read(int(self.headers['Content-Length']))
                number = next(numbers)
                answer = {'choices': [{'output_ids': [number]}], 'usage': {'prompt_tokens': 9}}
                self.send(reply(number), json.dumps(answer))

            def send(self, status, text):
                self.send_response(status)
                self.send_header('Content-Length', str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f'http://127.0.0.1:{server.server_address[1]}'

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_wrong_and_lost_answers_are_found(impostor, tmp_path):
    output = tmp_path / 'soak.json'
    url = impostor(lambda number: 500 if number == 3 else 200)
    done = soak('--requests', 12, '--cancel', 0, '--clients', 2, '--base-url', url, '--output-file', output)
    assert done.returncode == 1 and 'problems.' in done.stdout.splitlines()[-1]
    problems = json.loads(output.read_text())['problems']
    assert sum('was not answered: status 500' in problem for problem in problems) == 1
    assert sum('in company' in problem for problem in problems) == 11
    assert any('12 requests, 0 cancelled, 11 were answered' in problem for problem in problems)
    assert any('still queued' in problem for problem in problems)  # the counter of waits stands still


def test_a_server_that_does_not_answer():
    done = soak('--requests', 4, '--base-url', 'http://127.0.0.1:1')
    assert done.returncode == 1 and 'does not answer' in done.stdout and 'Traceback' not in done.stderr


# --- growth ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampler():
    return Sampler(None)


REQUESTS = 2000
STEADY = {'pss': 1000 * MIB, 'uss': 500 * MIB, 'file_descriptors': 50, 'threads': 20}


@pytest.mark.parametrize(
    ('more', 'found'),
    [
        ({}, []),
        ({'pss': 29 * MIB, 'uss': 29 * MIB, 'file_descriptors': 4}, []),
        ({'pss': 31 * MIB}, ['pss grew']),
        ({'uss': 31 * MIB, 'threads': 5}, ['uss grew', 'threads grew']),
        ({'file_descriptors': 5}, ['file_descriptors grew']),
    ],
)
def test_growth_after_the_first_half(sampler, more, found):
    for finished in range(REQUESTS):
        # Warming up, a first quarter may hold anything.
        now = {name: value // 2 if finished < REQUESTS // 4 else value for name, value in STEADY.items()}
        if finished >= REQUESTS * 3 // 4:
            now = {name: value + more.get(name, 0) for name, value in now.items()}
        sampler.samples.append({'finished': finished, **now})
    sentences = sampler.growth(REQUESTS)
    assert len(sentences) == len(found)
    assert all(sentence.startswith(start) for sentence, start in zip(sentences, found, strict=True))


def test_a_run_too_short_to_warm_up_says_nothing_of_growth(sampler):
    for finished in range(100):
        sampler.samples.append({'finished': finished, **STEADY, 'pss': finished * 100 * MIB})
    assert not sampler.judges(100) and sampler.growth(100) == []
    assert not sampler.judges(REQUESTS)  # no sample in its last quarter
