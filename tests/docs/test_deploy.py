"""The files of docs/deploy: what can be read without a cluster, a container or a GPU is right."""

import configparser
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmdeploy_vico.options import OptionError, Options

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / 'docs' / 'deploy'
CLOSING = 15  # seconds in which LMDeploy closes its engine; docs/serving.md
COMMAND = 'lmdeploy serve api_server '


@pytest.fixture(scope='module')
def known():
    """The options of the server."""
    shown = subprocess.run([sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', '--help'], capture_output=True)
    return set(re.findall(r'--[a-z][\w-]+', shown.stdout.decode()))


@pytest.fixture(scope='module')
def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(DEPLOY / 'lmdeploy-vico.service')
    return parser['Service']


@pytest.fixture(scope='module')
def pod():
    stateful, service = yaml.safe_load_all((DEPLOY / 'kubernetes.yaml').read_text())
    assert (stateful['kind'], service['kind']) == ('StatefulSet', 'Service')
    assert stateful['spec']['serviceName'] == service['metadata']['name']
    labels = stateful['spec']['template']['metadata']['labels']
    assert stateful['spec']['selector']['matchLabels'] == service['spec']['selector'] == labels
    return stateful['spec']['template']['spec']


def test_commands_have_options_that_exist(known, unit, pod):
    commands = [line for path in (ROOT / 'docs').rglob('*.md') for line in path.read_text().splitlines()]
    commands = [
        line[line.index(COMMAND) :] for line in commands if COMMAND in line and not line.startswith(('|', '-', '>'))
    ]
    commands += [unit['ExecStart'], shlex.join(pod['containers'][0]['args'])]
    used = {option for line in commands for option in re.findall(r'(?<=\s)--[a-z][\w-]+', line.partition('#')[0])}
    assert len(used) > 3 and used <= known


def test_variables_are_options():
    files = [DEPLOY / name for name in ('lmdeploy-vico.service', 'kubernetes.yaml', 'recipes.md', 'Dockerfile')]
    names = {name for file in files for name in re.findall(r'LMDEPLOY_VICO_([A-Z][A-Z_]+)', file.read_text())}
    assert {'SHUTDOWN_GRACE', 'VISION_DEVICE'} <= names
    assert {name.lower() for name in names} <= {field.name for field in dataclasses.fields(Options)}


def test_supervisors_wait_for_the_end(unit, pod):
    environment = dict(one.split('=', 1) for one in re.findall(r'^Environment=(.+)$', _unit_text(), re.MULTILINE))
    assert int(unit['TimeoutStopSec']) >= int(environment['LMDEPLOY_VICO_SHUTDOWN_GRACE']) + CLOSING
    assert unit['Restart'] == 'on-failure'
    [server] = pod['containers']
    variables = {one['name']: one['value'] for one in server['env']}
    hook = int(server['lifecycle']['preStop']['exec']['command'][1])
    needed = int(variables['LMDEPLOY_VICO_SHUTDOWN_GRACE']) + CLOSING + hook
    assert pod['terminationGracePeriodSeconds'] >= needed


def test_a_pod_is_given_no_variables_that_look_like_options(pod, monkeypatch):
    assert pod['enableServiceLinks'] is False
    monkeypatch.setenv('LMDEPLOY_VICO_SERVICE_HOST', '10.0.0.1')  # as for a service of this name
    with pytest.raises(OptionError, match='LMDEPLOY_VICO_SERVICE_HOST is not an option'):
        Options.load(None)


def test_a_server_may_write_what_it_has_to(unit, pod):
    user = re.search(r'--uid (\d+)', (DEPLOY / 'Dockerfile').read_text())[1]
    assert str(pod['securityContext']['fsGroup']) == user
    written = re.findall(r'^Environment=(?:HOME|HF_HOME)=(.+)$', _unit_text(), re.MULTILINE)
    assert written == [f'/var/lib/{unit["StateDirectory"]}'] * 2


def test_probes_ask_for_the_health(pod):
    [server] = pod['containers']
    port = server['args'][server['args'].index('--server-port') + 1]
    assert [str(one['containerPort']) for one in server['ports']] == [port]
    probes = [server[f'{name}Probe'] for name in ('startup', 'readiness', 'liveness')]
    assert all(one['httpGet'] == {'path': '/health', 'port': 'http'} for one in probes)
    startup, readiness, liveness = (one['periodSeconds'] * one['failureThreshold'] for one in probes)
    assert readiness < liveness < startup
    assert {one['name'] for one in server['volumeMounts']} >= {one['name'] for one in pod['volumes']}


def _unit_text():
    return (DEPLOY / 'lmdeploy-vico.service').read_text()


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='needs systemd-analyze')
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / 'lmdeploy-vico.service'
    unit.write_text(_unit_text().replace('/opt/lmdeploy-vico/bin/lmdeploy', sys.executable))
    done = subprocess.run(['systemd-analyze', 'verify', unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def test_the_image_is_made_of_what_is_there():
    lines = (DEPLOY / 'Dockerfile').read_text().replace('\\\n', ' ').splitlines()
    copied = [name for line in lines if line.startswith('COPY ') for name in line.split()[1:-1]]
    assert 'lmdeploy_vico' in copied and all((ROOT / name).exists() for name in copied)
    entry = next(line for line in lines if line.startswith('ENTRYPOINT '))
    assert entry == 'ENTRYPOINT ["lmdeploy", "serve", "api_server"]'
