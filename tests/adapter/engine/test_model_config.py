"""What reaches the engine's workers, which may have an environment of their own."""

import pickle

from lmdeploy.pytorch.config import ModelConfig

from lmdeploy_vico.options import Options


def test_options_travel_with_the_config(make_checkpoint, monkeypatch):
    monkeypatch.setenv('LMDEPLOY_VICO_DUMMY_WEIGHTS', '1')
    monkeypatch.setenv('LMDEPLOY_VICO_KERNELS', 'triton')
    monkeypatch.setenv('LMDEPLOY_VICO_LANGUAGE_ENGINE', 'pytorch')  # has been chosen when the config is read
    overrides = {'vico': {'kernels': 'torch', 'max_tiles': 6}}
    config = ModelConfig.from_pretrained(str(make_checkpoint()), hf_overrides=overrides, dtype='bfloat16')
    config = pickle.loads(pickle.dumps(config.hf_config))
    options = Options.load({'vico': config.vico}, environ={})
    assert (options.dummy_weights, options.kernels, options.max_tiles) == (True, 'torch', 6)
