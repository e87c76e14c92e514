"""The command against a server that knows what it answers."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import pytest
from aiohttp import web
from bench.conftest import FakeServer
from waiting import HANG

from lmdeploy_vico import cli
from lmdeploy_vico.evaluation import report
from lmdeploy_vico.evaluation.answers import AnswerFile
from lmdeploy_vico.evaluation.scores import Result

COUNT = 12
MODES = ['none', 'auto', 'all']


@pytest.fixture
def evaluate(tmp_path, capsys):
    """``evaluate(*arguments)``: exit status, what was printed, and the JSON if there is one."""
    path = tmp_path / 'results.json'

    def run(*arguments) -> tuple[int, str, dict | None]:
        status = cli.main(['eval', '--output-file', str(path), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, json.loads(path.read_text()) if path.exists() else None

    return run


def right(question, compression):
    """Right without compression; of every third question's number nothing is left with it."""
    number = int(question.split()[-1])
    return 'nothing' if compression == 'all' and number % 3 == 0 else str(number)


def lines(results):
    return {(line['category'], line['compression']): line for line in results['results']}


def test_scores_shares_and_what_is_asked(stand_in, data_file, evaluate):
    server = stand_in(right)
    status, printed, results = evaluate('--base-url', server.url, '--data', data_file(COUNT), '--max-tiles', 6)
    assert status == 0
    found = lines(results)
    assert found[None, 'none']['score'] == found[None, 'auto']['score'] == 100
    assert found[None, 'all']['score'] == pytest.approx(100 * 8 / 12)
    assert found['even', 'all']['correct'] == found['odd', 'all']['correct'] == 4
    assert found[None, 'all']['retention_low'] < 100 * 8 / 12 < found[None, 'all']['retention_high']
    assert [found[None, mode]['compressed_tiles'] for mode in MODES] == [0, COUNT, 2 * COUNT]
    assert found[None, 'all']['tiles'] == 2 * COUNT
    assert found[None, 'auto']['mean_prompt_tokens'] == 256 + 64 + 10
    assert len(server.bodies) == 3 * COUNT
    body = server.bodies[0]
    assert body['temperature'] == 0 and body['messages'][0]['content'][0]['image_url']['max_dynamic_patch'] == 6
    assert 'even' in printed and '66.7' in printed and f'{3 * COUNT} of {3 * COUNT} questions asked' in printed


def test_none_is_always_asked(stand_in, data_file, evaluate):
    server = stand_in(right)
    _, _, results = evaluate('--base-url', server.url, '--data', data_file(3), '--compression', '0.5')
    assert {line['compression'] for line in results['results']} == {'none', '0.5'}
    assert {body['mm_processor_kwargs']['image']['compression'] for body in server.bodies} == {'none', 0.5}


def test_so_many_at_a_time(stand_in, data_file, evaluate):
    server = stand_in(right, hold=5)
    status, _, _ = evaluate('--base-url', server.url, '--data', data_file(COUNT), '--max-concurrency', 5)
    assert status == 0 and server.most_running == 5


def test_goes_on_after_it_was_killed(stand_in, data_file, evaluate, tmp_path):
    path = data_file(COUNT)
    server = stand_in(right)
    _, _, whole = evaluate('--base-url', server.url, '--data', path)
    kept = tmp_path / 'results.json.answers.jsonl'
    settings, *answers = kept.read_text().splitlines()
    # As it is when the process is killed while it writes its 21st answer.
    kept.write_text('\n'.join([settings, *answers[:20], answers[20][:30]]))
    asked = len(server.bodies)
    status, printed, again = evaluate('--base-url', server.url, '--data', path)
    assert status == 0
    assert len(server.bodies) - asked == 3 * COUNT - 20
    assert '20 answers are in' in printed
    assert again['results'] == whole['results']


def test_a_process_that_is_killed(stand_in, data_file, evaluate, tmp_path):
    path, kept = data_file(COUNT), tmp_path / 'results.json.answers.jsonl'
    processes = []

    def answer(question, mode):
        if len(server.bodies) == 20:
            processes[0].kill()
        return right(question, mode)

    server = stand_in(answer)
    files = '--data', path, '--output-file', tmp_path / 'results.json', '--max-concurrency', '2'
    command = [sys.executable, '-m', 'lmdeploy_vico.cli', 'eval', '--base-url', server.url, *map(str, files)]
    processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    assert processes[0].wait(HANG) == -signal.SIGKILL
    _, *lines = kept.read_text().splitlines()
    assert len(lines) > 10
    asked = len(server.bodies)
    status, _, results = evaluate('--base-url', server.url, '--data', path)
    assert status == 0 and len(server.bodies) - asked in (3 * COUNT - len(lines), 3 * COUNT - len(lines) + 1)
    assert [line['total'] for line in results['results'] if line['category'] is None] == [COUNT] * 3


def test_answers_of_another_evaluation_are_not_taken(stand_in, data_file, evaluate):
    server, path = stand_in(right), data_file(3)
    evaluate('--base-url', server.url, '--data', path)
    status, printed, _ = evaluate('--base-url', server.url, '--data', path, '--max-tokens', 5)
    assert status == 1
    assert 'holds answers of another evaluation (max_tokens differ)' in printed


def test_what_is_asked_otherwise_is_asked_again(stand_in, data_file, evaluate):
    server, path = stand_in(right), data_file(4)
    evaluate('--base-url', server.url, '--data', path)
    kept, asked = path.read_text(), len(server.bodies)
    path.write_text(kept.replace('question 2', 'question 1'))
    _, printed, results = evaluate('--base-url', server.url, '--data', path)
    assert len(server.bodies) - asked == 3
    assert '9 answers are in' in printed and lines(results)[None, 'none']['correct'] == 3
    # Another rule asks for another form of answers.
    asked = len(server.bodies)
    evaluate('--base-url', server.url, '--data', path, '--rule', 'pope')
    assert len(server.bodies) - asked == 3 * 4


def test_more_data_sets_and_questions_later(stand_in, data_file, evaluate):
    server, one, other = stand_in(right), data_file(4), data_file(3, 'other.tsv')
    evaluate('--base-url', server.url, '--data', one, '--limit', 2)
    evaluate('--base-url', server.url, '--data', other)
    _, _, results = evaluate('--base-url', server.url, '--data', one, other)
    assert len(server.bodies) == 3 * (4 + 3)
    assert {line['data'] for line in results['results']} == {'data', 'other'}


def test_answers_are_there_when_the_next_run_is_killed_at_its_beginning(
    stand_in, data_file, evaluate, tmp_path, monkeypatch
):
    server, path = stand_in(right), data_file(3)
    evaluate('--base-url', server.url, '--data', path)
    kept = tmp_path / 'results.json.answers.jsonl'
    before = kept.read_text()

    class Killed(BaseException):
        pass

    def write(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(AnswerFile, '_write', write)
        evaluate('--base-url', server.url, '--data', path)
    assert kept.read_text() == before


@pytest.mark.parametrize('what', ['directory', 'no space'])
def test_answers_that_cannot_be_kept(stand_in, data_file, evaluate, tmp_path, what):
    kept = tmp_path / 'results.json.answers.jsonl'
    if what == 'directory':
        kept.mkdir()
    else:
        (tmp_path / 'results.json.answers.jsonl.part').symlink_to('/dev/full')
    status, printed, _ = evaluate('--base-url', stand_in(right).url, '--data', data_file(3))
    assert status == 1 and 'results.json.answers.jsonl cannot be' in printed


def test_a_video_that_is_gone_is_a_failure(stand_in, tmp_path, evaluate):
    path, video = tmp_path / 'clips.tsv', tmp_path / 'clip.mp4'
    path.write_text('index\tquestion\tanswer\tvideo\n0\tquestion 0\t0\tclip\n1\tquestion 1\t1\t\n')
    video.write_bytes(b'video')

    def answer(question, mode):
        video.unlink(missing_ok=True)
        return question.split()[-1]

    arguments = '--max-concurrency', 1, '--compression', 'none', 'all'
    status, printed, results = evaluate('--base-url', stand_in(answer).url, '--data', path, *arguments)
    assert status == 1 and '1 x The video cannot be read' in printed
    assert [line['total'] for line in results['results']] == [1, 1]


def test_failures_are_named_counted_and_asked_again(stand_in, data_file, evaluate):
    faults = {('question 4', 'all'), ('question 7', 'none')}
    server = stand_in(lambda question, mode: 400 if (question, mode) in faults else right(question, mode))
    arguments = '--base-url', server.url, '--data', data_file(COUNT)
    status, printed, results = evaluate(*arguments)
    assert status == 1
    assert '2 requests failed' in printed and '2 x HTTP 400: It is not to be.' in printed
    assert {line['total'] for line in results['results'] if line['category'] is None} == {COUNT - 2}
    assert {(one['index'], one['compression']) for one in results['failed']} == {('4', 'all'), ('7', 'none')}
    faults.clear()
    asked = len(server.bodies)
    status, _, results = evaluate(*arguments)
    assert status == 0 and len(server.bodies) - asked == 2
    assert results['failed'] == [] and lines(results)[None, 'all']['total'] == COUNT


def test_answers_of_something_else(stand_in, data_file, evaluate):
    page = '<html>Log in</html>'
    server = stand_in(lambda question, mode: web.Response(text=page, content_type='text/html'))
    status, printed, _ = evaluate('--base-url', server.url, '--data', data_file(2))
    assert status == 1 and '6 x The answer is not what an OpenAI server sends' in printed


def test_a_busy_server_is_asked_again(stand_in, data_file, evaluate):
    busy = {f'question {number}' for number in range(3)}

    def answer(question, mode):
        if question in busy:
            busy.remove(question)
            return 503
        return right(question, mode)

    status, _, _ = evaluate('--base-url', stand_in(answer).url, '--data', data_file(COUNT))
    assert status == 0 and not busy


def test_a_server_that_answers_nothing_is_given_up(stand_in, data_file, evaluate):
    server = stand_in(lambda question, mode: 500)
    status, printed, _ = evaluate('--base-url', server.url, '--data', data_file(200), '--max-concurrency', 4)
    assert status == 1
    assert 'requests in a row failed, the last with: HTTP 500' in printed
    assert 'The answers so far are kept' in printed
    assert len(server.bodies) < 40


def test_no_server(data_file, evaluate, unused_url):
    status, printed, _ = evaluate('--base-url', unused_url, '--data', data_file(2))
    assert status == 1 and 'No OpenAI server answers at' in printed


@pytest.fixture
def unused_url():
    from lmdeploy_vico.ports import hold_port

    with hold_port('127.0.0.1') as holder:
        yield f'http://127.0.0.1:{holder.getsockname()[1]}'


def test_bad_arguments(data_file, evaluate, capsys):
    path = data_file(2)
    with pytest.raises(SystemExit):
        evaluate('--base-url', 'x', '--data', path, '--compression', 'most')
    assert 'must be "auto", "none", "all"' in capsys.readouterr().err
    for option in ('--max-concurrency', '--limit', '--max-tiles'):
        with pytest.raises(SystemExit):
            evaluate('--base-url', 'x', '--data', path, option, '0')
        assert 'must be at least 1, not 0' in capsys.readouterr().err
    status, printed, _ = evaluate('--base-url', 'http://x', '--data', path, path)
    assert status == 1 and 'Two data sets are called data' in printed
    status, printed, _ = evaluate('--base-url', 'http://x', '--data', path, '--', '--tp', '2')
    assert status == 1 and 'Arguments after -- are for a server that is started here' in printed
    status, printed, _ = evaluate('--base-url', 'http://x', '--data', path, '--bench-results', path)
    assert status == 1 and '--bench-results is for --plot' in printed


@pytest.fixture(scope='module')
def bench_results(tmp_path_factory):
    """What `lmdeploy-vico bench` writes, of two lengths of text and both modes."""
    path, server = tmp_path_factory.mktemp('bench') / 'first-token.json', FakeServer()
    few = '--num-prompts 4 --max-concurrency 2 --tiles 4 --token-compression 0 0.75 --text-tokens 16 8 --mode llm image'
    try:
        assert cli.main(['bench', '--base-url', server.url, '--output-file', str(path), *few.split()]) == 0
    finally:
        server.stop()
    return path


def test_throughputs_that_were_measured(bench_results, tmp_path):
    cells = json.loads(bench_results.read_text())['cells']
    [gain] = [
        cell['speedup']
        for cell in cells
        if (cell['mode'], cell['text_tokens'], cell['token_compression']) == ('image', 8, 0.75)
    ]
    measured = report.throughputs(bench_results)
    assert measured == [(0, 1), (0.75, gain)]
    assert report.speed(result('all', compressed_tiles=100), measured) == gain
    assert report.speed(result('0.5', compressed_tiles=50), measured) == pytest.approx((1 + gain) / 2)
    assert math.isnan(report.speed(result('all', compressed_tiles=100), [(0, 1), (0.5, 2)]))
    picture = tmp_path / 'plot.png'
    lines = [result('none', compressed_tiles=0), result('all', compressed_tiles=100)]
    assert report.draw(picture, lines, [(0, 1), (0.5, 2)]) == lines[1:]
    assert report.draw(picture, lines, []) == []
    nothing_to_retain = dataclasses.replace(lines[1], retention=None, retention_low=None, retention_high=None)
    assert report.draw(picture, [nothing_to_retain], []) == [nothing_to_retain]


def result(compression, compressed_tiles):
    return Result('data', None, compression, 5, 10, 50, 90, 85, 95, 100, compressed_tiles, 500)


@pytest.mark.parametrize('throughputs', [True, False])
def test_plot(stand_in, data_file, evaluate, tmp_path, bench_results, throughputs):
    picture = tmp_path / 'plot.png'
    arguments = ['--data', data_file(COUNT), '--plot', picture]
    if throughputs:
        arguments += ['--bench-results', bench_results]
    status, printed, _ = evaluate('--base-url', stand_in(right).url, *arguments)
    assert status == 0 and picture.read_bytes().startswith(b'\x89PNG')
    assert printed.rstrip().endswith(f'Plot: {picture}')


@pytest.mark.parametrize('content', ['{}', '{"cells": []}', 'no JSON'])
def test_other_results(data_file, evaluate, tmp_path, content):
    path = tmp_path / 'other.json'
    path.write_text(content)
    arguments = '--data', data_file(2), '--plot', tmp_path / 'plot.png', '--bench-results', path
    status, printed, _ = evaluate('--base-url', 'http://x', *arguments)
    assert status == 1 and 'does not hold results of `lmdeploy-vico bench`' in printed
