"""Random weights of published shapes are served from their files, by the plugin and by LMDeploy's own classes."""

import pytest
from serving.client import Client

from lmdeploy_vico.checkpoints.random import make_checkpoint_with_weights
from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.checkpoints.random.published import Model

PLUGIN = pytest.param((), {}, id='plugin')
LMDEPLOY = pytest.param(('--trust-remote-code',), {'LMDEPLOY_VICO': 'cpu'}, id="LMDeploy's flash mode")


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return make_checkpoint_with_weights(tmp_path_factory.mktemp('weights') / '8B', Model(SIZES['tiny']))


@pytest.mark.long
@pytest.mark.parametrize(('arguments', 'environment'), [PLUGIN, LMDEPLOY])
def test_images_are_answered(serve, checkpoint, prompts, arguments, environment):
    server = serve(checkpoint, *arguments, **environment)
    client = Client(server)
    answers = {name: client.chat(prompts[name]) for name in ('one photograph', 'a scanned page')}
    assert len({answer.token_ids for answer in answers.values()}) == 2
    assert ('vision side:' in server.log_text()) == (not environment)
    assert 'DUMMY WEIGHTS' not in server.log_text()
    server.stop()
