"""The evaluation against a served checkpoint: what it counts is what an independent implementation routes."""

import csv
import json

import pytest
from parity.conversations import data_url
from serving.configurations import DEFAULT

from lmdeploy_vico import cli

MODES = ['none', 'auto', 'all', '0.5', 'random:0.4', 'image:0.5']

pytestmark = DEFAULT


@pytest.fixture
def data(pictures, tmp_path):
    """A data set of photographs, and its pictures."""
    shown = [pictures[name].convert('RGB') for name in ('coffee', 'page', 'text')]
    path = tmp_path / 'photographs.tsv'
    with path.open('w', newline='') as file:
        writer = csv.writer(file, delimiter='\t')
        writer.writerow(['index', 'question', 'answer', 'image'])
        writer.writerows([n, 'What is it?', 'x', data_url(one).partition(',')[2]] for n, one in enumerate(shown))
    return path, shown


def evaluated(client, path, output, modes):
    files = '--data', str(path), '--output-file', str(output)
    assert (
        cli.main(['eval', '--base-url', client.server.url, *files, '--max-tokens', '2', '--compression', *modes]) == 0
    )
    return {line['compression']: line for line in json.loads(output.read_text())['results']}


def test_shares_of_compressed_tiles(client, judge, data, tmp_path):
    path, shown = data
    found = evaluated(client, path, tmp_path / 'one.json', MODES)
    for mode in MODES:
        compression = float(mode) if mode == '0.5' else mode
        tiles = [tokens for one in shown for tokens in judge().reference.encode([one], compression)[0].tile_tokens]
        assert found[mode]['tiles'] == len(tiles)
        assert found[mode]['compressed_tiles'] == tiles.count(64), mode
    assert 0 < found['random:0.4']['compressed_tiles'] < found['all']['compressed_tiles']
    again = evaluated(client, path, tmp_path / 'other.json', MODES[::-1])
    assert {mode: line['compressed_tiles'] for mode, line in again.items()} == {
        mode: line['compressed_tiles'] for mode, line in found.items()
    }
