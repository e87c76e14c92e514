"""The servers that a measurement starts, and what becomes of it when one of them fails."""

import json
import re

import pytest
from safetensors import safe_open

from lmdeploy_vico import cli
from lmdeploy_vico.bench import BenchError, servers
from lmdeploy_vico.bench.workload.requests import FLASH, IMAGE, INTERNVL, LLM, OURS, OURS_ON_TURBOMIND, TURBOMIND
from lmdeploy_vico.launch import ServerError


def tensors(folder) -> dict:
    found = {}
    for file in folder.glob('*.safetensors'):
        with safe_open(file, framework='pt') as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def test_a_checkpoint_without_its_router(make_checkpoint, tmp_path):
    original = make_checkpoint()
    copy = servers.without_router(original, tmp_path / 'copy')
    before, after = tensors(original), tensors(copy)
    dropped = set(before) - set(after)
    assert {name.partition('.')[0] for name in dropped} == {'mlp2', 'pooling_before_gating', 'gating'}
    assert set(after) < set(before)
    assert all(tensor.equal(before[name]) and tensor.dtype == before[name].dtype for name, tensor in after.items())
    assert set(json.loads((copy / servers.INDEX_FILE).read_text())['weight_map']) == set(after)
    config, changed = (json.loads((folder / 'config.json').read_text()) for folder in (original, copy))
    assert set(config) - set(changed) == set(servers.FLASH_KEYS)
    assert {file.name for file in copy.iterdir()} == {file.name for file in original.iterdir()}
    assert (copy / 'tokenizer.json').is_symlink()
    assert set(tensors(original)) == set(before)


def test_a_disk_that_fills_up_while_the_copy_is_written(make_checkpoint, tmp_path, monkeypatch):
    def write(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(servers, '_copy', write)
    with pytest.raises(BenchError, match='No space left on device. The variable TMPDIR names another place'):
        servers.without_router(make_checkpoint(), tmp_path / 'copy')


def test_a_plain_checkpoint_is_links_only(make_checkpoint, tmp_path):
    copy = servers.without_router(make_checkpoint(flash=False), tmp_path / 'copy')
    assert all(file.is_symlink() for file in copy.glob('*.safetensors'))


def test_a_checkpoint_that_is_cut_off(make_checkpoint, tmp_path):
    broken = tmp_path / 'broken'
    broken.mkdir()
    for file in make_checkpoint().iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-1] if file.suffix == '.safetensors' else content)
    with pytest.raises(BenchError, match=r'is damaged: the file has \d+ bytes, and its header describes \d+'):
        servers.without_router(broken, tmp_path / 'copy')
    with pytest.raises(BenchError, match='needs a directory'):
        servers.without_router(tmp_path / 'missing', tmp_path / 'copy')


def test_our_server_keeps_no_tiles_and_takes_synthetic_images_where_they_are_sent(tmp_path):
    for modes, synthetic in (([IMAGE], None), ([LLM], '1')):
        server = servers.make_server(OURS, 'm', modes, on_gpu=True, extra=['--tp', '2'], scratch=tmp_path)
        assert server._environment.get('LMDEPLOY_VICO_SYNTHETIC_IMAGES') == synthetic
        assert server._environment['LMDEPLOY_VICO_CACHE_BYTES'] == '0'
        assert 'LMDEPLOY_VICO' not in server._environment
        assert server._environment['LMDEPLOY_VICO_LANGUAGE_ENGINE'] == 'pytorch'
        assert server.command[-2:] == ['--tp', '2']


def test_the_plugin_on_turbomind_is_a_server_of_its_own(tmp_path):
    server = servers.make_server(OURS_ON_TURBOMIND, 'm', [LLM], on_gpu=True, extra=[], scratch=tmp_path)
    assert server._environment['LMDEPLOY_VICO_LANGUAGE_ENGINE'] == 'turbomind'
    assert server._environment['LMDEPLOY_VICO_SYNTHETIC_IMAGES'] == '1'
    assert '--backend' not in server.command and server.log.name == 'turbomind.log'


@pytest.mark.parametrize(('on_gpu', 'switch'), [(True, '0'), (False, 'cpu')])
def test_baselines_are_served_without_our_classes(make_checkpoint, tmp_path, on_gpu, switch):
    for name in (FLASH, INTERNVL):
        server = servers.make_server(name, str(make_checkpoint()), [IMAGE], on_gpu, [], tmp_path)
        assert server._environment['LMDEPLOY_VICO'] == switch
        # Without it, LMDeploy would choose TurboMind on a GPU, which knows nothing of flash mode.
        assert server.command[-3:] == ['--trust-remote-code', '--backend', 'pytorch']


def test_turbomind_serves_the_checkpoint_as_it_is(tmp_path):
    server = servers.make_server(TURBOMIND, 'm', [IMAGE], on_gpu=True, extra=[], scratch=tmp_path)
    assert server.command[3] == 'm'
    assert server.command[-2:] == ['--backend', 'turbomind']


def test_what_decides_how_a_server_works_is_recorded(monkeypatch):
    monkeypatch.setenv('LMDEPLOY_VICO_DUMMY_WEIGHTS', '1')
    monkeypatch.setenv('LMDEPLOY_VICO', 'cpu')
    monkeypatch.setenv('SECRET', 'x')
    recorded = servers.recorded({'LMDEPLOY_VICO': None, 'OMP_WAIT_POLICY': 'PASSIVE'})
    assert 'SECRET' not in recorded
    assert recorded['LMDEPLOY_VICO_DUMMY_WEIGHTS'] == '1'
    assert recorded['OMP_WAIT_POLICY'] == 'PASSIVE'
    assert 'LMDEPLOY_VICO' not in recorded


@pytest.mark.parametrize(
    ('arguments', 'started', 'together', 'gpu', 'said'),
    [
        (['--server-port', '1'], [], False, True, '--server-port is chosen here'),
        (['--server-name=0.0.0.0'], [], False, False, '--server-name is chosen here'),
        ([], [OURS, TURBOMIND], True, False, 'lmdeploy-turbomind needs a CUDA device'),
        ([], [OURS_ON_TURBOMIND], True, False, 'turbomind needs a CUDA device'),
        ([], [OURS, FLASH], True, True, '--cache-max-entry-count 0.2'),
        ([], [OURS, OURS_ON_TURBOMIND], True, True, '--cache-max-entry-count 0.2'),
        (['--cache-max-entry-count', '0.3'], [OURS, FLASH], True, True, None),
        ([], [OURS, FLASH], True, False, None),
        ([], [OURS], True, True, None),
        ([], [OURS, OURS_ON_TURBOMIND, FLASH, TURBOMIND], False, True, None),
    ],
)
def test_arguments_that_no_fair_measurement_comes_of(arguments, started, together, gpu, said):
    if said is None:
        return servers.check_arguments(arguments, started, together, gpu)
    with pytest.raises(BenchError, match=said):
        servers.check_arguments(arguments, started, together, gpu)


def test_the_reason_is_the_last_exception_of_the_log(tmp_path):
    server = servers.make_server(OURS, 'm', [IMAGE], on_gpu=False, extra=[], scratch=tmp_path)
    server.log.write_text('INFO: fine\nValueError: first\n  torch.OutOfMemoryError: no memory left\nbye\n')
    assert servers.why_ended(server) == 'torch.OutOfMemoryError: no memory left'
    server.log.write_text('INFO: fine\n')
    assert servers.why_ended(server) == 'its log names no exception'


class Fake:
    """A fake server in the place of one that the measurement starts."""

    def __init__(self, server, running: list[str], name: str, starts: bool = True) -> None:
        self.url, self.command, self.environment = server.url, ['serve', name], {'LMDEPLOY_VICO_CACHE_BYTES': '0'}
        self._running, self._name, self._starts = running, name, starts

    def start(self):
        self._running.append(self._name)

    def wait_until_ready(self):
        if not self._starts:
            raise ServerError('The server ended while starting')

    def alive(self):
        return False  # it has no process whose time could be read

    def stop(self):
        self._running.remove(self._name)

    def log_text(self, most: int) -> str:
        return 'Traceback\nRuntimeError: killed\n'


@pytest.fixture
def bench(fake_server, monkeypatch, tmp_path, capsys):
    """``bench(faults by server, *arguments)``: exit status, what was printed, the JSON."""

    def run(faults: dict, *arguments: str, gpu: str = ''):
        running: list[str] = []
        starts = {name: fault != 'no start' for name, fault in faults.items()}
        fakes = {}

        def make(name, *rest):
            fault = faults.get(name) if starts.get(name, True) else None
            fakes[name] = fake_server(**({'image_tokens': name == OURS} | (fault or {})))
            return Fake(fakes[name], running, name, starts.get(name, True))

        original = servers.environment
        monkeypatch.setattr(servers, 'make_server', make)
        monkeypatch.setattr(servers, 'check_model', lambda model: None)
        monkeypatch.setattr(servers, 'gpu_name', lambda: gpu)
        monkeypatch.setattr(servers, 'environment', lambda device: {**original(device), 'device': device})
        path = tmp_path / 'results.json'
        few = ['--num-prompts', '8', '--max-concurrency', '2', '--tiles', '3', '--text-tokens', '8']
        few += ['--token-compression', '0', '--baseline', FLASH, INTERNVL, '--output-file', str(path)]
        status = cli.main(['bench', '--model', 'm', *few, *arguments])
        assert running == []  # all of them were stopped
        return status, ''.join(capsys.readouterr()), json.loads(path.read_text()) if path.exists() else None

    return run


def completed(results: dict) -> dict[str, int]:
    return {cell['server']: cell['completed'] for cell in results['cells']}


@pytest.mark.parametrize(
    ('gpu', 'arguments', 'together'),
    [
        ('', [], True),
        ('H200', [], False),
        ('H200', ['--servers', 'together', '--', '--cache-max-entry-count', '0.2'], True),
        ('', ['--servers', 'in-turn'], False),
    ],
)
def test_servers_run_together_or_in_turn(bench, gpu, arguments, together):
    status, printed, results = bench({}, *arguments, gpu=gpu)
    assert status == 0
    assert results['servers_together'] == together
    assert ('all run' if together else 'then in reverse') in printed
    assert completed(results) == {OURS: 8, FLASH: 8, INTERNVL: 8}
    assert results['environment']['device'] == (gpu or 'cpu')
    assert [cell['speedup'] is not None for cell in results['cells']] == [True] * 3


@pytest.mark.parametrize('order', ['together', 'in-turn'])
def test_a_baseline_whose_engine_ends_is_reported_and_the_run_goes_on(bench, order):
    # Six requests warm it up: one without text, one of every shape, and twice as many as are sent at a time.
    status, printed, results = bench({FLASH: {'engine_ends_after': 6 + 3}}, '--servers', order)
    assert status == 0
    assert results['complete']
    assert completed(results) == {OURS: 8, FLASH: 0, INTERNVL: 8}
    flash = results['cells'][1]
    assert flash['failed'] >= 2
    assert flash['error'] == 'the server or its engine ended: RuntimeError: killed'
    assert 'RuntimeError: killed' in printed


def test_a_baseline_that_ends_while_it_is_warmed_up_or_started(bench):
    status, _, results = bench({FLASH: {'engine_ends_after': 2}, INTERNVL: 'no start'})
    assert status == 0
    assert completed(results) == {OURS: 8, FLASH: 0, INTERNVL: 0}
    assert [cell['error'] for cell in results['cells'][1:]] == [
        'the server or its engine ended while warming up: RuntimeError: killed',
        'the server did not start: RuntimeError: killed',
    ]


def test_servers_in_turn_go_through_in_reverse_as_well(bench):
    many = ['--num-prompts', '300', '--servers', 'in-turn']  # three rounds: two in the first pass
    status, printed, results = bench({}, *many)
    assert status == 0
    assert completed(results) == {OURS: 300, FLASH: 300, INTERNVL: 300}
    assert re.findall(r'^\$ serve (\S+)', printed, re.MULTILINE) == [OURS, FLASH, INTERNVL, FLASH, OURS]
    assert [len(cell['round_durations']) for cell in results['cells']] == [3, 3, 3]


def test_a_run_without_turns_says_so(bench):
    assert 'too few requests for cells to take turns' in bench({})[1]


def test_a_baseline_with_other_prompts_is_not_compared(bench):
    status, _, results = bench({FLASH: {'overhead': 20}})
    assert status == 0
    assert completed(results) == {OURS: 8, FLASH: 0, INTERNVL: 8}
    assert results['cells'][1]['error'] == ('Its prompts have 788 tokens instead of 784: it does not do the same work.')


def test_without_our_own_server_there_is_nothing_to_measure(bench):
    status, printed, results = bench({OURS: 'no start'})
    assert status == 1
    assert 'ended while starting' in printed
    assert results is None


@pytest.mark.parametrize('engines', [['pytorch', 'turbomind'], ['turbomind']], ids=' '.join)
def test_both_language_engines_in_one_run(bench, engines):
    """The first of them is what baselines are compared with, and each of them is compared with itself."""
    ours = {'pytorch': OURS, 'turbomind': OURS_ON_TURBOMIND}
    wanted = ['--token-compression', '0', '0.5', '--language-engine', *engines, '--baseline', TURBOMIND]
    answers = {OURS_ON_TURBOMIND: {'image_tokens': True}}
    status, printed, results = bench(answers, *wanted, gpu='H200')
    assert status == 0, printed
    names = [ours[engine] for engine in engines]
    assert completed(results) == dict.fromkeys([*names, TURBOMIND], 8)
    speedups = {(cell['server'], cell['token_compression']): cell['speedup'] for cell in results['cells']}
    assert all(speedups[name, 0.0] == 1 and speedups[name, 0.5] for name in names)
    assert speedups[TURBOMIND, None]
    assert ('Each language engine against itself.' in printed) == (len(engines) > 1)
    assert 'lmdeploy-vico on TurboMind' in printed


def test_an_engine_that_does_not_start_costs_the_others_nothing(bench):
    both = ['--language-engine', 'pytorch', 'turbomind']
    status, _, results = bench({OURS_ON_TURBOMIND: 'no start'}, *both, gpu='H200')
    assert status == 1  # it is the plugin's own
    assert completed(results) == {OURS: 8, OURS_ON_TURBOMIND: 0, FLASH: 8, INTERNVL: 8}
    assert results['cells'][1]['error'] == 'the server did not start: RuntimeError: killed'
