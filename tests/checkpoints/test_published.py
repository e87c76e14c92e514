"""The published models' shapes add up to the published numbers of parameters, for both sides."""

import json

import pytest
import torch

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.checkpoints.random.published import MODELS
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.model.tower import VisionTower

# Billions of parameters of the language model, as the model cards give them.
LANGUAGE = {
    '1B': 0.752,
    '2B': 2.03,
    '4B': 4.41,
    '8B': 8.19,
    '14B': 14.77,
    '30B-A3B': 30.53,
    '38B': 32.76,
    '241B': 235.09,
}
INTERNVIT = {1024: 0.304, 3200: 5.54}


@pytest.mark.parametrize('name', MODELS)
def test_parameters(tmp_path, name):
    path = make_checkpoint_without_weights(tmp_path / name, name)
    config = load_vico_config(str(path))
    shapes = language_model_shapes(config.llm_config, config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(LANGUAGE[name], rel=2e-3)

    vico = VicoConfig.from_pretrained(path)
    with torch.device('meta'):
        tower = VisionTower(vico)
    vit = sum(weight.numel() for weight in tower.vision_model.parameters())
    width = vico.vision.hidden_size
    assert vit / 1e9 == pytest.approx(INTERNVIT[width], rel=2e-3)
    # Steps 3 and 4 of the pooling are in checkpoints, but not loaded.
    router = sum(w.numel() for part in (tower.pooling_before_gating, tower.gating) for w in part.parameters())
    assert router == pytest.approx(40 * width**2, rel=2e-3)


def test_language_model_of_transformers_has_the_same_tensors(tmp_path):
    from transformers import AutoModelForCausalLM

    for name in ('8B', '241B'):
        config = load_vico_config(str(make_checkpoint_without_weights(tmp_path / name, name)))
        with torch.device('meta'):
            model = AutoModelForCausalLM.from_config(config.llm_config)
        expected = sum(torch.Size(shape).numel() for shape in language_model_shapes(config.llm_config, config).values())
        assert sum(weight.numel() for weight in model.parameters()) == expected


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r'one of 1B, 2B.*got .9B'):
        make_checkpoint_without_weights(tmp_path / 'x', '9B')
    assert not (tmp_path / 'x').exists()


def test_tokens_of_the_tokenizer_are_in_the_vocabulary(tmp_path):
    path = make_checkpoint_without_weights(tmp_path / 'x', '30B-A3B')
    llm = json.loads((path / 'config.json').read_text())['llm_config']
    assert llm['vocab_size'] == 151936 > max(json.loads((path / 'added_tokens.json').read_text()).values())
    assert (llm['num_experts'], llm['num_experts_per_tok'], llm['tie_word_embeddings']) == (128, 8, False)
