"""Fixtures shared by all rooms: tiny checkpoints, made once per run, and real pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope='session')
def make_checkpoint(tmp_path_factory) -> MakeCheckpoint:
    """``make_checkpoint(llm=..., vit=..., flash=..., dtype=...)``: a tiny checkpoint, shared and not to be changed."""
    from lmdeploy_vico.testing import make_tiny_checkpoint

    made: dict[tuple, Path] = {}

    def make(llm: str = 'dense', vit: str = 'layer_norm', flash: bool = True, dtype: str = 'bfloat16') -> Path:
        key = (llm, vit, flash, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp('checkpoint') / '-'.join([llm, vit, 'flash' if flash else 'plain', dtype])
            made[key] = make_tiny_checkpoint(path, llm=llm, vit=vit, flash=flash, dtype=dtype)
        return made[key]

    return make


@pytest.fixture(scope='session')
def pictures() -> dict[str, Image.Image]:
    """Real photographs and a scanned page, by name."""
    from skimage import data

    names = ('astronaut', 'coffee', 'chelsea', 'page', 'rocket', 'text')
    return {name: Image.fromarray(getattr(data, name)()) for name in names}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
