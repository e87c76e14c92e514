"""The dashboard and the alerts in docs/deploy: every series that they ask for is one of a running server's."""

import json
import re
import urllib.request
from pathlib import Path

import yaml
from parity.conversations import on_the_wire
from serving.configurations import CACHING
from waiting import HANG

DEPLOY = Path(__file__).parents[3] / 'docs' / 'deploy'
SERIES = re.compile(r'__name__=~"(vico|lmdeploy)\[:_\](\w+)"')
LABELS = re.compile(SERIES.pattern + r',(\w+)="(\w+)"')

pytestmark = CACHING


def expressions():
    panels = json.loads((DEPLOY / 'dashboard.json').read_text())['panels']
    yield from (target['expr'] for panel in panels for target in panel.get('targets', ()))
    [group] = yaml.safe_load((DEPLOY / 'alerts.yml').read_text())['groups']
    yield from (rule['expr'] for rule in group['rules'])


def test_every_series_exists(client, prompts):
    messages = on_the_wire(prompts['one photograph'])
    client.openai.chat.completions.create(model=client.model, messages=messages, max_tokens=2)
    with urllib.request.urlopen(f'{client.server.url}/metrics', timeout=HANG) as response:
        text = response.read().decode()
    there = {line.partition(' ')[0].partition('{')[0] for line in text.splitlines() if not line.startswith('#')}
    wanted = [f'{room}:{name}' for expression in expressions() for room, name in SERIES.findall(expression)]
    assert len(wanted) > 30
    assert set(wanted) <= there
    for expression in expressions():
        for room, name, label, value in LABELS.findall(expression):
            assert re.search(rf'^{room}:{name}{{[^}}]*{label}="{value}"', text, re.MULTILINE), (name, label, value)
