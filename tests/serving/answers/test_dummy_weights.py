"""A checkpoint without any weight file is served with weights that are made up."""

import pytest
from parity.conversations import on_the_wire
from serving.client import Client

from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.checkpoints.sizes import VOCABULARY, Model

# Memory for the logits of a prefill is set aside: 150,000 of each token, however small the model.
FEW = ('--max-prefill-token-num', '512')
OVERRIDES = ('--hf-overrides', '{"vico": {"dummy_weights": true}}')
SMALL = {
    'dense': (Model(SIZES['tiny']), (), {'LMDEPLOY_VICO_DUMMY_WEIGHTS': '1'}),
    'moe': (Model(SIZES['tiny'], 'moe', 'rms_norm'), OVERRIDES, {}),
}


@pytest.mark.parametrize('name', ['dense', pytest.param('moe', marks=pytest.mark.long)])
def test_images_are_answered(serve, prompts, tmp_path, name):
    model, arguments, environment = SMALL[name]
    path = make_checkpoint_without_weights(tmp_path / name, model)
    client = Client(serve(path, *FEW, *arguments, **environment))
    options = {'model': client.model, 'messages': on_the_wire(prompts['one photograph']), 'max_tokens': 8}

    def ask(compression):
        extra = {'return_token_ids': True, 'ignore_eos': True, 'mm_processor_kwargs': {'image': compression}}
        completion = client.openai.chat.completions.create(**options, temperature=0, extra_body=extra)
        details = completion.usage.prompt_tokens_details.to_dict()
        assert completion.usage.completion_tokens == 8
        assert completion.usage.prompt_tokens > details['image_tokens']
        return details['image_tokens'], completion.choices[0].model_extra['output_ids']

    (full, answer), (hard, other), again = (ask({'compression': value}) for value in ('none', 'all', 'all'))
    assert full == 4 * hard > 0
    assert again == (hard, other)
    # An answer follows the prompt: no logits that are all alike, or not finite.
    assert answer != other and len({*answer, *other}) > 2
    assert max(answer + other) > 1024, 'the head has the size of the config, not of the tokenizer'
    assert max(answer + other) < VOCABULARY
    chunks = list(client.openai.chat.completions.create(**options, stream=True))
    assert chunks[-1].choices[0].finish_reason == 'length'
    assert 'WARNING - DUMMY WEIGHTS: all weights are made up' in client.server.log_text()
