"""The eight published structures, narrow and shallow, through all stages of training, and then served."""

import json

import pytest
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from parity.judge import TOKENS
from PIL import Image
from serving.training.trained import QUESTION, SAMPLES, Trained, train
from training.made import write_data

from lmdeploy_vico.checkpoints.random import make_checkpoint_with_weights
from lmdeploy_vico.checkpoints.random.configuration import Size
from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE
from lmdeploy_vico.checkpoints.random.published import MODELS, Model
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS, VOCABULARY

pytestmark = pytest.mark.server

GREEDY = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
VOCABULARY_ROWS = -(-(VOCABULARY + len(SPECIAL_TOKENS)) // 128) * 128
NARROWER = 16
FEW = SAMPLES[1::2]  # three tiles, and none


def narrow(model: Model) -> Model:
    """The structure at 1/16 width, with two layers; all heads and experts are there.

    The 6B ViT is twice as wide as that: the router's 16 heads and the ViT's 25 have to divide it.
    """
    size = model.size
    vit_width = 400 if model.vit == 'rms_norm' else size.vit_width // NARROWER
    return Model(
        Size(
            vit_width=vit_width,
            vit_layers=2,
            vit_heads=size.vit_heads if model.vit == 'rms_norm' else 4,
            vit_mlp=4 * vit_width,
            hidden=size.hidden // NARROWER,
            layers=2,
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim // NARROWER,
            mlp=size.mlp // NARROWER,
            experts=size.experts,
            experts_per_token=size.experts_per_token,
            expert_mlp=size.expert_mlp // NARROWER,
        ),
        model.llm,
        model.vit,
        VOCABULARY_ROWS,
    )


IN_SHORT = ('1B', '30B-A3B')  # dense, and a mixture of experts


@pytest.fixture(params=[pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.long) for name in MODELS])
def plain(request, tmp_path):
    """The structure as a plain checkpoint, computed in float32."""
    path = make_checkpoint_with_weights(tmp_path / 'plain', narrow(MODELS[request.param]))
    file = path / 'config.json'
    config = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith('flash')}
    for part in (config, config['llm_config'], config['vision_config']):
        part['dtype'] = 'float32'
    file.write_text(json.dumps(config))
    return path


def test_all_stages_and_an_engine(plain, pictures, tmp_path):
    data = write_data(tmp_path, pictures, FEW)
    trained = Trained(train(plain, data, tmp_path, count=1), data)
    config = PytorchEngineConfig(**TINY_ENGINE, session_len=8192)
    with pipeline(str(trained.path), backend_config=config) as pipe:
        for index, written in enumerate(FEW):
            content = [
                {'type': 'image_data', 'image_data': {'data': Image.open(data.parent / name)}}
                for name in written.get('image', [])
            ]
            messages = [{'role': 'user', 'content': [*content, {'type': 'text', 'text': QUESTION}]}]
            [answer] = pipe([messages], gen_config=GREEDY)
            length, ours = trained.greedy(index, answer.token_ids)
            assert answer.input_token_len == length
            assert answer.token_ids == ours
    assert any(trained.shares), 'something is compressed'
