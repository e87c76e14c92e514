"""The command against servers that do, and do not do, what they should."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from bench.conftest import OVERHEAD
from ports import free_port
from waiting import HANG

from lmdeploy_vico import cli
from lmdeploy_vico.bench.client import Client
from lmdeploy_vico.bench.report import results as results_module
from lmdeploy_vico.bench.workload.requests import FLASH, IMAGE, INTERNVL, LLM, OURS, Cell, Requests

FEW = ['--num-prompts', '12', '--max-concurrency', '3', '--tiles', '5', '--text-tokens', '8']
SHARES = ['--token-compression', '0', '0.5', 'auto']


@pytest.fixture
def bench(tmp_path, capsys):
    """``bench(*arguments)``: exit status, what was printed, and the JSON if there is one."""
    path = tmp_path / 'results.json'

    def run(*arguments: str) -> tuple[int, str, dict | None]:
        status = cli.main(['bench', *FEW, *SHARES, '--output-file', str(path), *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, json.loads(path.read_text()) if path.exists() else None

    return run


def ask_all(url: str, bodies: list[bytes], concurrency: int, timeout: float = HANG):
    async def ask():
        async with Client(url, timeout) as client:
            return await client.round(bodies, concurrency)

    return asyncio.run(ask())


def bodies(count: int, mode: str = IMAGE) -> list[bytes]:
    requests = Requests('fake', 5, ['data:'], {8: ['one two three four five six seven eight'] * count})
    return [requests.body(Cell(mode, OURS, 8, 0.5), index) for index in range(count)]


@pytest.mark.busy
def test_a_round_keeps_so_many_on_their_way(fake_server):
    server = fake_server(hold=4)
    measured = ask_all(server.url, bodies(40), 4)
    assert len(measured.outcomes) == len(server.bodies) == 40
    assert not measured.gave_up
    assert server.most_running == 4
    assert all(0 < outcome.ttft < measured.duration and outcome.error is None for outcome in measured.outcomes)
    assert {outcome.prompt_tokens - outcome.image_tokens for outcome in measured.outcomes} == {8 + OVERHEAD}


@pytest.mark.busy
def test_a_round_ends_when_nothing_is_answered_any_more(fake_server):
    server = fake_server(engine_ends_after=5)
    measured = ask_all(server.url, bodies(40), 4)
    assert measured.gave_up
    assert len(measured.outcomes) < 16
    assert measured.outcomes[-1].error == 'HTTP 503: The inference engine is unavailable.'
    assert sum(outcome.error is None for outcome in measured.outcomes) == 5


@pytest.mark.busy
def test_a_server_that_never_answers_is_timed_out():
    async def silent():
        server = await asyncio.start_server(lambda reader, writer: asyncio.Event().wait(), '127.0.0.1', 0)
        async with server, Client(f'http://127.0.0.1:{server.sockets[0].getsockname()[1]}', 0.2) as client:
            return await client.ask(b'{}')

    assert asyncio.run(silent()).error == 'The server did not answer in time.'


def test_both_modes(fake_server, bench, tmp_path):
    server = fake_server()
    plot = tmp_path / 'plot.png'
    status, printed, results = bench('--base-url', server.url, '--mode', LLM, IMAGE, '--plot', str(plot))
    assert status == 0
    assert 'auto is left out' in printed
    assert plot.stat().st_size > 10_000
    assert results['complete']
    assert [(c['mode'], c['token_compression']) for c in results['cells']] == [
        (LLM, 0.0), (LLM, 0.5), (IMAGE, 0.0), (IMAGE, 0.5), (IMAGE, 'auto'),
    ]  # fmt: skip
    for cell in results['cells']:
        assert (cell['completed'], cell['failed'], cell['error']) == (12, 0, None)
        assert cell['user_text_tokens_per_request'] == 8
        assert cell['request_throughput'] == pytest.approx(12 / cell['duration'])
        assert cell['seconds_per_request']['prefill'] == pytest.approx(0.01)
    # 12 requests of 5 tiles at 50 %: two thirds of 60 tiles are 40, each 192 tokens less.
    half = results['cells'][3]
    assert half['total_input_vision_tokens'] == 60 * 256 - 40 * 192
    assert half['achieved_token_compression'] == pytest.approx(0.5)


def test_measured_requests_differ(fake_server, bench):
    server = fake_server()
    assert bench('--base-url', server.url, '--token-compression', '0')[0] == 0
    asked = [json.dumps(body['messages']) for body in server.bodies[-12:]]
    assert len(set(asked)) == 12


def test_cells_take_turns_as_often_as_asked(fake_server, bench):
    server = fake_server()
    status, printed, results = bench('--base-url', server.url, '--round-prompts', '4')
    assert status == 0 and 'One round of each cell' not in printed
    assert [len(cell['round_durations']) for cell in results['cells']] == [3, 3, 3]
    assert {cell['completed'] for cell in results['cells']} == {12}
    assert {cell['processor_seconds_per_request'] for cell in results['cells']} == {None}, 'a server elsewhere'
    _, printed, results = bench('--base-url', server.url)
    assert [len(cell['round_durations']) for cell in results['cells']] == [1, 1, 1]
    assert 'One round of each cell' in printed


def test_no_server(bench, tmp_path):
    (tmp_path / 'results.json').write_text('{"earlier": true}')
    status, printed, results = bench('--base-url', f'http://127.0.0.1:{free_port()}')
    assert status == 1
    assert results == {'earlier': True}
    assert 'No server answers at' in printed
    assert 'check --base-url' in printed


def test_a_server_that_refuses_synthetic_images(fake_server, bench):
    status, printed, results = bench('--base-url', fake_server(synthetic=False).url, '--mode', LLM)
    assert status == 1
    assert 'LMDEPLOY_VICO_SYNTHETIC_IMAGES=1' in printed
    assert 'synthetic is no key' in printed
    assert results is None


@pytest.mark.parametrize(
    ('fault', 'said'),
    [({'image_tokens': False}, 'not served as a ViCO model'), ({'compresses': False}, 'does not do what it is asked')],
)
def test_a_model_that_is_not_vico(fake_server, bench, fault, said):
    status, printed, results = bench('--base-url', fake_server(**fault).url)
    assert status == 1
    assert said in printed
    assert results is None


@pytest.mark.parametrize('how', ['dies_after', 'engine_ends_after'])
def test_a_server_that_ends_in_the_middle(fake_server, bench, how):
    # Warming up takes 8 requests without compression, 9 at 50 % and 8 with auto; then come rounds of 12.
    status, printed, results = bench('--base-url', fake_server(**{how: 25 + 12 + 4}).url)
    assert status == 1
    assert 'The server or its engine ended during the measurement' in printed
    assert not results['complete']
    assert [cell['completed'] for cell in results['cells']] == [12, 0, 0]  # whole rounds only
    assert results['cells'][1]['failed'] >= 3
    assert 'ended' in results['cells'][2]['error']


def test_an_output_that_cannot_be_written_is_said_before_anything_is_asked(fake_server, bench, tmp_path):
    server = fake_server()
    for path, said in (
        (tmp_path, 'is a directory or a device'),
        (tmp_path / 'missing' / 'file', 'No such file or directory'),
    ):
        status, printed, _ = bench('--base-url', server.url, '--output-file', str(path))
        assert status == 1
        assert said in printed
    assert server.bodies == []


def test_a_disk_that_fills_up_is_said_and_the_tables_are_printed(fake_server, bench, monkeypatch):
    written = []

    def dump(content, file, **options):
        written.append(len(content['cells']))
        if len(written) > 1:
            raise OSError(28, 'No space left on device')
        file.write(json.dumps({'round': 1}))

    monkeypatch.setattr(results_module.json, 'dump', dump)
    status, printed, results = bench('--base-url', fake_server().url)
    assert status == 1
    assert 'Requests per second' in printed
    assert printed.count('No space left on device') == 2  # when it happened, and at the end
    assert results == {'round': 1}


def test_options_that_do_not_go_together(bench, tmp_path):
    for arguments, said in (
        (
            ['--base-url', 'http://localhost', '--baseline', 'lmdeploy-flash'],
            'have servers of their own: use --model',
        ),
        (
            ['--base-url', 'http://localhost', '--language-engine', 'pytorch', 'turbomind'],
            'have servers of their own',
        ),
        (['--base-url', 'http://localhost', '--', '--tp', '2'], 'are for a server that is started here'),
        (['--model', str(tmp_path)], 'holds no config.json'),
        (['--model', 'nowhere'], 'holds no config.json'),
    ):
        status, printed, _ = bench(*arguments)
        assert status == 1
        assert said in printed


def test_importing_the_client_loads_neither_lmdeploy_nor_torch():
    code = 'import sys, lmdeploy_vico.bench.first_token; print([m for m in ("torch", "lmdeploy") if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.server
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_no_server_is_left_when_the_run_is_ended(make_checkpoint, tmp_path, number, status):
    command = [str(Path(sys.executable).with_name('lmdeploy-vico')), 'bench', '--model', str(make_checkpoint()), *FEW]
    command += ['--mode', 'llm', '--output-file', str(tmp_path / 'results.json')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts) as bench:
        try:
            started = next(line for line in bench.stdout if line.startswith('$ lmdeploy serve'))
            [server] = psutil.Process(bench.pid).children()
            assert started.split()[started.split().index('--server-port') + 1] in server.cmdline()
            bench.send_signal(number)
            assert bench.wait(HANG) == status
            assert not server.is_running()
        finally:
            bench.kill()


SMOKE = ['--num-prompts', '8', '--max-concurrency', '4', '--tiles', '2', '--token-compression', '0', '0.75']


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize('baselines', [[FLASH], [FLASH, INTERNVL]])
def test_both_modes_and_baselines_for_real(make_checkpoint, bench, baselines):
    arguments = [*SMOKE, '--mode', LLM, IMAGE, '--baseline', *baselines, '--count-prefills']
    status, printed, results = bench('--model', str(make_checkpoint()), *arguments)
    assert status == 0, printed
    cells = {(cell['mode'], cell['server'], cell['token_compression']): cell for cell in results['cells']}
    image = [(IMAGE, OURS, share) for share in (0.0, 0.75)]
    count = 1 + len(baselines)
    assert len(results['servers']) == count and not [one for one in results['servers'].values() if 'log-level' in one]
    assert printed.count('Counting prefill steps: $ ') == printed.count('--log-level DEBUG') == count
    assert list(cells) == [(LLM, OURS, 0.0), (LLM, OURS, 0.75), *image, *((IMAGE, name, None) for name in baselines)]
    assert {(cell['completed'], cell['failed'], cell['error']) for cell in cells.values()} == {(8, 0, None)}
    # LMDeploy schedules its flash mode's tokens as if nothing were compressed.
    for key, cell in cells.items():
        visual = 128 if key[2] == 0.75 else 512
        others = cells[key[0], OURS, 0.0]['input_tokens_per_request'] - 512
        assert cell['input_tokens_per_request'] == visual + others
        assert cell['kv_blocks_per_request'] == -(-cell['input_tokens_per_request'] // 64)
        # At most 8192 tokens a step, so many prompts at least, and no more steps than prompts.
        assert cell['input_tokens_per_request'] / 8192 <= cell['prefill_steps_per_request'] <= 1
        assert cell['user_text_tokens_per_request'] == 8
        assert cell['cached_tokens'] == 0
    most = cells[image[1]]
    assert most['achieved_token_compression'] == 0.75
    parts = most['seconds_per_request']
    assert all(parts[name] > 0 for name in ('decode', 'tiling', 'vit', 'prefill'))
    assert sum(parts.values()) == pytest.approx(most['mean_ttft_ms'] / 1e3, rel=0.2)
