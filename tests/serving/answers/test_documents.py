"""The Python examples of the documents, run against a server."""

import base64
import re
from pathlib import Path

import pytest
from parity.conversations import data_url, video_url
from parity.videos import moving_crops, write_video
from serving.configurations import DEFAULT

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r'^```python\n(.*?)^```', re.MULTILINE | re.DOTALL)

pytestmark = DEFAULT


@pytest.fixture
def example(client, pictures, tmp_path, monkeypatch):
    """``example(document)``: the document's examples as one program, for this server and with pictures of ours."""
    monkeypatch.chdir(tmp_path)
    _, _, encoded = data_url(pictures['coffee']).partition('base64,')
    Path('photograph.jpg').write_bytes(base64.b64decode(encoded))
    video = write_video(tmp_path / 'match.mp4', moving_crops(pictures['coffee'], 24))
    replacements = {
        'http://localhost:23333': client.server.url,
        'https://example.com/photograph.jpg': data_url(pictures['coffee']),
        'https://example.com/scan.png': data_url(pictures['page']),
        'https://example.com/match.mp4': video_url(video),
        'max_tokens=64': 'max_tokens=4',
    }

    def program(document):
        text = '\n'.join(BLOCK.findall((ROOT / document).read_text()))
        for old, new in replacements.items():
            text = text.replace(old, new)
        assert 'example.com' not in text
        return text

    return program


@pytest.mark.parametrize('document', ['README.md', 'docs/requests.md'])
def test_examples_are_answered(client, example, document):
    before, tiles = client.metric('vico:visual_tokens_total'), client.encoded_tiles()
    exec(compile(example(document), document, 'exec'), {})
    assert client.metric('vico:visual_tokens_total') > before
    assert client.encoded_tiles() >= tiles
