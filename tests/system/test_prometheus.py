"""A real Prometheus scrapes a running server: it takes the alerts, and every query of the dashboard returns data."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
from parity.conversations import on_the_wire
from PIL import Image
from ports import free_port
from system.programs import program
from waiting import HANG

from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.system, pytest.mark.server]

DEPLOY = Path(__file__).parents[2] / 'docs' / 'deploy'
SCRAPES = 20  # that a query looks back on; one a second
WINDOW = '30s'
CONFIG = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
scrape_configs:
  - job_name: lmdeploy
    static_configs: [{{targets: ['{target}']}}]
rule_files: ['{rules}']
"""


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server')
    arguments = '--enable-prefix-caching', '--max-batch-size', '8', '--num-gpu-blocks', '512'
    with ApiServer(make_tiny_checkpoint(folder / 'tiny'), *arguments, log=folder / 'log') as running:
        yield running


@pytest.fixture(scope='module')
def prometheus(server, tmp_path_factory):
    """Its URL; it scrapes the server every second."""
    folder, port = tmp_path_factory.mktemp('prometheus'), free_port()
    config = folder / 'prometheus.yml'
    target = server.url.removeprefix('http://')
    config.write_text(CONFIG.format(target=target, rules=DEPLOY / 'alerts.yml'))
    subprocess.run([program('promtool', 'prometheus'), 'check', 'config', config], check=True)
    options = (
        f'--config.file={config}',
        f'--storage.tsdb.path={folder / "data"}',
        f'--web.listen-address=127.0.0.1:{port}',
    )
    with (
        (folder / 'log').open('w') as log,
        subprocess.Popen([program('prometheus', 'prometheus'), *options], stderr=log) as process,
    ):
        try:
            yield f'http://127.0.0.1:{port}'
        finally:
            process.terminate()


def get(url, **parameters):
    with urllib.request.urlopen(f'{url}?{urllib.parse.urlencode(parameters)}', timeout=HANG) as response:
        return json.load(response)['data']


def until(condition):
    """Ask again until it holds: Prometheus has to start, and to scrape."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail('Prometheus has not come so far.')


def ask(client, number):
    """One request with a picture that nobody has sent before."""
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (448, 896, 3), np.uint8))
    items = [{'type': 'image_url', 'image_url': {'url': picture}}, {'type': 'text', 'text': 'What is this?'}]
    messages = on_the_wire([{'role': 'user', 'content': items}])
    client.chat.completions.create(model=client.models.list().data[0].id, messages=messages, max_tokens=3)


@pytest.fixture(scope='module')
def scraped(server, prometheus):
    """Prometheus, when it has scraped a server that answers questions, some of them twice."""
    client = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', timeout=HANG)
    sent = iter(range(10_000))

    def enough():
        ask(client, next(sent) // 2)
        [series] = get(f'{prometheus}/api/v1/query', query=f'count_over_time(up{{job="lmdeploy"}}[{WINDOW}])')['result']
        return int(series['value'][1]) >= SCRAPES

    until(lambda: get(f'{prometheus}/api/v1/query', query='up{job="lmdeploy"} == 1')['result'])
    until(enough)
    return prometheus


def queries():
    for panel in json.loads((DEPLOY / 'dashboard.json').read_text())['panels']:
        for target in panel.get('targets', ()):
            yield pytest.param(target['expr'], id=f'{panel["title"]}: {target["legendFormat"]}')


@pytest.mark.parametrize('expression', list(queries()))
def test_a_query_of_the_dashboard(scraped, expression):
    query = expression.replace('$__rate_interval', WINDOW).replace('$instance', '.*')
    found = get(f'{scraped}/api/v1/query', query=query)['result']
    assert found and all(np.isfinite(float(series['value'][1])) for series in found), query


def test_the_alerts_are_evaluated(scraped):
    [group] = get(f'{scraped}/api/v1/rules')['groups']
    assert len(group['rules']) == 7
    until(lambda: all(rule['health'] == 'ok' for rule in get(f'{scraped}/api/v1/rules')['groups'][0]['rules']))
    states = {rule['name']: rule['state'] for rule in get(f'{scraped}/api/v1/rules')['groups'][0]['rules']}
    assert states['ServerDown'] == 'inactive'


def test_a_server_that_is_gone_is_told_of(scraped, server):
    server.stop()

    def told():
        [group] = get(f'{scraped}/api/v1/rules')['groups']
        return any(rule['name'] == 'ServerDown' and rule['state'] != 'inactive' for rule in group['rules'])

    until(told)
