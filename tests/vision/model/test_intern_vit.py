"""InternViT: how pixels become its input."""

import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel


def test_pixels_are_normalised_in_float32_whatever_the_dtype(make_checkpoint):
    model = InternVisionModel(VicoConfig.from_pretrained(make_checkpoint()).vision).to(torch.bfloat16)
    for _ in ('computed', 'kept'):
        assert {statistic.dtype for statistic in model.embeddings.statistics()} == {torch.float32}
        model.freeze()
