"""What clients name by a uuid: kept once it has been decoded, and found by the same client only."""

import asyncio
import base64

import pytest
from parity.conversations import data_url
from PIL import Image

from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.media import MediaParser
from lmdeploy_vico.adapter.server.placement.start import media_loader
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.adapter.server.served import ServedRequest, serving
from lmdeploy_vico.media.store import MediaStore
from lmdeploy_vico.options import Options
from lmdeploy_vico.vision.tiling import Tiling

RED, BLUE = (data_url(Image.new('RGB', (9, 7), colour)) for colour in ('red', 'blue'))
RULES = Rules(Tiling(1, 12), 40, media_ids=True)


@pytest.fixture(scope='module')
def loader():
    loader = media_loader(Options(decode_processes=1), serves=False)
    yield loader
    loader.close()


@pytest.fixture
def parser(loader):
    return MediaParser(loader, MediaStore(2**20))


def colours(parser, *items, key=''):
    """The colour of each picture that one client's message shows."""

    async def decode():
        with serving(ServedRequest(key=key)):
            return await parser(parse_request([{'role': 'user', 'content': list(items)}], None, None, RULES))

    return [job.image.convert('RGB').getpixel((3, 3)) for job in asyncio.run(decode()).images]


def item(url=None, uuid='cat', kind='image_url'):
    return {'type': kind, kind: {'url': url} if url else None, 'uuid': uuid}


def test_a_name_stands_for_what_was_sent(parser):
    assert colours(parser, item(RED)) == [(255, 0, 0)]
    assert colours(parser, item(), item(BLUE, 'dog'), item()) == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert colours(parser, item(BLUE)) == colours(parser, item()) == [(0, 0, 255)]  # the new one replaces it


def test_of_another_client_nothing_is_found(parser):
    colours(parser, item(RED), key='a')
    assert colours(parser, item(), key='a') == [(255, 0, 0)]
    for key in ('b', ''):
        with pytest.raises(ValueError, match="No image or video is kept as uuid 'cat', or no longer: send it with its"):
            colours(parser, item(), key=key)


def test_what_cannot_be_decoded_is_not_kept(parser):
    colours(parser, item(RED))
    with pytest.raises(ValueError, match='image'):
        colours(parser, item('data:image/png;base64,' + base64.b64encode(b'hello').decode()))
    assert colours(parser, item()) == [(255, 0, 0)]


def test_an_item_without_a_name_is_not_kept(parser):
    colours(parser, {'type': 'image_url', 'image_url': {'url': RED}})
    assert parser._named._store.taken == 0


def test_what_is_fetched_is_kept_as_it_was_then(loader, parser, monkeypatch):
    served = [RED, BLUE]

    async def fetch(url, *_):
        assert url == 'HTTPS://example.com/cat.png'
        return base64.b64decode(served.pop(0).partition(',')[2])

    monkeypatch.setattr(loader._fetcher, 'fetch', fetch)
    assert colours(parser, item('HTTPS://example.com/cat.png')) == [(255, 0, 0)]
    assert colours(parser, item()) == [(255, 0, 0)] and served == [BLUE]


def test_files_of_the_server_are_not_kept(parser, tmp_path):
    Image.new('RGB', (9, 7), 'red').save(tmp_path / 'cat.png')
    assert colours(parser, item(str(tmp_path / 'cat.png'))) == [(255, 0, 0)]
    assert parser._named._store.taken == 0


def test_what_was_not_used_for_longest_has_to_be_sent_again(loader):
    parser = MediaParser(loader, MediaStore(2600))  # room for two
    for name, url in (('cat', RED), ('dog', BLUE), ('cow', RED)):
        colours(parser, item(url, name))
    assert colours(parser, item(uuid='dog'), item(uuid='cow')) == [(0, 0, 255), (255, 0, 0)]
    with pytest.raises(ValueError, match="uuid 'cat'"):
        colours(parser, item(uuid='cat'))


def test_synthetic_images_name_nothing(parser):
    synthetic = {'type': 'image_url', 'image_url': {'url': RED, 'synthetic': {'tiles': 1, 'compressed': 0, 'seed': 1}}}
    rules = Rules(Tiling(1, 12), 40, synthetic=True, media_ids=True)
    request = parse_request([{'role': 'user', 'content': [{**synthetic, 'uuid': 'cat'}]}], None, None, rules)
    assert len(asyncio.run(parser(request)).images) == 1 and parser._named._store.taken == 0
