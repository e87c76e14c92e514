"""The stand-in for TurboMind with one place for requests, and a vocabulary larger than what its ``top_k`` takes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving.client import Client, chat, generate, message
from serving.configurations import STAND_IN
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

pytestmark = pytest.mark.server

VOCABULARY = 2048
SAMPLED = {'prompt': 'a', 'max_tokens': 4, 'temperature': 1.0}


def with_more_tokens(source: Path, path: Path) -> Path:
    """Copy a checkpoint, with embeddings of tokens that are never the most probable ones."""
    shutil.copytree(source, path)
    config = json.loads((path / 'config.json').read_text())
    config['llm_config']['vocab_size'] = VOCABULARY
    (path / 'config.json').write_text(json.dumps(config))
    for file in path.glob('*.safetensors'):
        weights = load_file(file)
        for name in weights:
            if name.endswith(('embed_tokens.weight', 'lm_head.weight')):
                rows = VOCABULARY - len(weights[name])
                weights[name] = torch.cat([weights[name], weights[name].new_zeros(rows, weights[name].shape[1])])
        save_file(weights, file, metadata={'format': 'pt'})
    return path


@pytest.fixture(scope='module')
def client(make_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    checkpoint = with_more_tokens(make_checkpoint(), folder / 'checkpoint')
    arguments = ('--max-batch-size', '1', '--session-len', '2048')
    with ApiServer(checkpoint, *arguments, log=folder / 'log', environment=STAND_IN, timeout=HANG) as server:
        yield Client(server)


@pytest.mark.parametrize('top_k', [1025, VOCABULARY - 1])
def test_a_top_k_that_would_end_the_server(client, top_k):
    status, body = generate(client, **SAMPLED, top_k=top_k)
    assert status == 400
    assert f'top_k must be at most 1024, or 0 for no limit, not {top_k}' in message(body)


@pytest.mark.parametrize('top_k', [0, 1024, VOCABULARY, VOCABULARY + 1])
def test_other_top_k(client, top_k):
    status, body = generate(client, **SAMPLED, top_k=top_k)
    assert status == 200, body
    assert 'terminate called' not in client.server.log_text()


@pytest.mark.parametrize(('regex', 'status'), [('(yes|no)', 200), ('(', 400)], ids=['an answer', 'a refusal'])
def test_no_grammar_is_left_for_the_next_request(client, regex, status):
    free = chat(client)[1]['choices'][0]
    response_format = {'type': 'regex_schema', 'regex_schema': regex}
    given, body = chat(client, response_format=response_format, ignore_eos=False)
    assert given == status, body
    if status == 200:
        [choice] = body['choices']
        assert choice['message']['content'] in ('yes', 'no') and choice['finish_reason'] == 'stop'
    assert chat(client)[1]['choices'][0]['output_ids'] == free['output_ids']
    assert free['message']['content'] not in ('yes', 'no')


def test_a_grammar_and_a_ban_that_together_leave_no_token(client):
    """After its only token the grammar allows the end only, which ``min_new_tokens`` bans."""
    response_format = {'type': 'regex_schema', 'regex_schema': 'a'}
    status, body = chat(client, response_format=response_format, min_new_tokens=3, ignore_eos=False)
    assert status == 400 and 'response_format cannot be used with min_new_tokens' in message(body)
    assert chat(client, response_format=response_format)[0] == 200
