"""Servers whose images are encoded by actors of a Ray cluster."""

import pytest
from parity.conversations import data_url
from ray_cluster import own_cluster, started
from serving.client import Client, chat, image_item
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.server, pytest.mark.ray]

ASKED = 3  # prompts with images


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    with own_cluster(tmp_path_factory.mktemp('token')) as one:
        yield one


def test_two_servers_share_two_encoders_and_answer_as_one_that_encodes_itself(
    serve, make_checkpoint, prompts, pictures, address
):
    checkpoint = make_checkpoint()
    asked = list(prompts.values())[:ASKED]
    alone = serve(checkpoint)
    client = Client(alone)
    expected = [client.chat(messages) for messages in asked]
    alone.stop()
    encoders = started(address, checkpoint, 2)
    setting = {'LMDEPLOY_VICO_VISION_DEVICE': f'ray:{address}', 'LMDEPLOY_VICO_ENCODER_SECONDS': '5'}
    clients = [Client(serve(checkpoint, **setting)) for _ in range(2)]
    for one in clients:
        assert [one.chat(messages) for messages in asked] == expected
        assert 'vision side: elsewhere, encoders of ray:' in one.server.log_text()

    encoders.stop()
    item = image_item(data_url(pictures['rocket']))
    status, body = chat(clients[0], item)
    assert status == 503 and 'No encoder of ray:' in str(body)
    again = started(address, checkpoint, 1)
    for one in clients:  # each finds it by itself, within a second or so
        while chat(one, item)[0] == 503:
            pass
        assert one.chat(asked[0]) == expected[0]
    again.stop()


def test_a_server_without_encoders_says_what_to_start(make_checkpoint, address, tmp_path):
    setting = {'LMDEPLOY_VICO_VISION_DEVICE': f'ray:{address}', 'LMDEPLOY_VICO_ENCODER_SECONDS': '1'}
    server = ApiServer(make_checkpoint(), log=tmp_path / 'log', environment=setting, timeout=HANG)
    server.start()
    try:
        assert server.wait_until_ended() != 0
    finally:
        server.stop()
    text = server.log_text()
    assert 'Start some with `lmdeploy-vico encoder --model DIR`' in text and 'no encoder of this checkpoint' in text
