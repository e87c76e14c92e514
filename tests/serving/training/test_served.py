"""What training writes is served as it is: an api_server's greedy tokens are those of the model that was trained."""

import pytest
from PIL import Image
from serving.client import Client
from serving.training.trained import QUESTION, SAMPLES, Trained, train
from training.made import write_data


@pytest.mark.long
@pytest.mark.parametrize('llm', ['dense', 'moe'])
def test_what_is_served_is_what_was_trained(serve, make_checkpoint, pictures, tmp_path, llm):
    data = write_data(tmp_path, pictures, SAMPLES)
    trained = Trained(train(make_checkpoint(llm=llm, flash=False, dtype='float32'), data, tmp_path), data)
    client = Client(serve(trained.path))
    for index, written in enumerate(SAMPLES):
        pictures = [Image.open(data.parent / name) for name in written.get('image', [])]
        content = [{'type': 'image_url', 'image_url': {'url': picture}} for picture in pictures]
        answer = client.chat([{'role': 'user', 'content': [*content, {'type': 'text', 'text': QUESTION}]}])
        length, ours = trained.greedy(index, answer.token_ids)
        assert answer.prompt_tokens == length
        assert list(answer.token_ids) == ours
    assert any(trained.shares), 'something is compressed'
