"""What training writes is served as it is: an api_server's greedy tokens are those of the model that was trained."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from serving.client import Client
from training.made import CPU, Made, gpt, human, write_data
from training.runs import made

from lmdeploy_vico.kernels import implementation
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.model.build import fill, outline
from lmdeploy_vico.training.stages.initialise import initialise
from lmdeploy_vico.vision.routing import route

QUESTION = 'What is it?'
SAMPLES = [
    {'image': images, 'conversations': [human('<image>\n' * len(images) + QUESTION), gpt('A page.')]}
    for images in (['cup.png'], ['wide.png'], ['cup.png', 'wide.png'])
] + [{'conversations': [human(QUESTION), gpt('Nothing.')]}]


@pytest.fixture(autouse=True)
def kernels():
    before = implementation.requested()
    yield
    implementation.use(before)


@pytest.fixture(scope='module', params=['dense', 'moe'])
def trained(request, make_checkpoint, pictures, tmp_path_factory):
    """A plain checkpoint after init and a few steps of either stage; and its data."""
    folder = tmp_path_factory.mktemp('trained')
    plain = make_checkpoint(llm=request.param, flash=False, dtype='float32')
    data = write_data(folder, pictures, SAMPLES)
    initialise(plain, folder / 'start')
    run = ['--reference', plain, '--data', data, '--batch', 2, '--rate', '1e-3']
    steps = ['--steps', 3, '--warm-up-steps', 2]
    made('consistency', '--model', folder / 'start', '--output', folder / 'vico', *run, *steps).run()
    judged = ['--held-out', data, '--compress', 0.5]
    made('router', '--model', folder / 'vico', '--output', folder / 'flash', *run, '--steps', 4, *judged).run()
    return folder / 'flash', data


def test_what_is_served_is_what_was_trained(serve, trained):
    path, data = trained
    client, samples = Client(serve(path)), Made(path, data).samples
    config = json.loads((path / 'config.json').read_text())
    thresholds = config['flash_relative_threshold'], config['flash_absolute_threshold']
    model = fill(outline(config).float(), [path], CPU)
    shares = []
    for index, written in enumerate(SAMPLES):
        pictures = [Image.open(data.parent / name) for name in written.get('image', [])]
        content = [{'type': 'image_url', 'image_url': {'url': picture}} for picture in pictures]
        answer = client.chat([{'role': 'user', 'content': [*content, {'type': 'text', 'text': QUESTION}]}])
        compressed = routed(model, samples[index], thresholds)
        shares.append(compressed.mean() if len(compressed) else None)
        batch, ours = greedy(model, samples[index], compressed, answer.token_ids)
        assert answer.prompt_tokens == batch.ids.shape[1] - len(answer.token_ids)
        assert list(answer.token_ids) == ours
    assert any(shares[:3]), 'something is compressed'


@torch.no_grad()
def routed(model, sample, thresholds):
    """Which of a sample's tiles the checkpoint's own router compresses."""
    if not len(sample.tiles):
        return torch.zeros(0, dtype=torch.bool).numpy()
    scores = torch.cat([model.encode(tile[None])[1] for tile in torch.from_numpy(sample.tiles)])
    return route(scores, 'auto', *thresholds).numpy()


@torch.no_grad()
def greedy(model, sample, compressed, answer):
    """The sample laid out with another answer, and the tokens that the model would have chosen in its place."""
    spans = [dataclasses.replace(span, ids=list(answer)) if span.response else span for span in sample.spans]
    batch = lay_out([dataclasses.replace(sample, spans=spans)], [compressed])
    logits = model(batch) @ model.language_model.lm_head.weight.T
    return batch, logits.argmax(-1).tolist()
