"""Fixtures shared by all rooms: tiny checkpoints, real pictures, prompts, and the judge of answers."""

import os
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity.conversations import conversations
from PIL import Image
from tiers import Guard, mark

MakeCheckpoint = Callable[..., Path]

# Tests, and the servers they start, leave a GPU alone unless they are told to use it: it may be somebody else's, and
# what they compare was counted on a CPU. PyTorch looks at this when a device is used first, long after this line.
if os.environ.get('VICO_TEST_DEVICE') != 'cuda':
    os.environ['CUDA_VISIBLE_DEVICES'] = ''


GUARD = Guard()


def pytest_configure(config: pytest.Config) -> None:
    GUARD.install()
    # The first process compiles, the servers and commands after it read: 4 s of a core each. New for every run, so that
    # nothing is read that another version of the code has left.
    compiled = tempfile.TemporaryDirectory(prefix='numba')
    config.add_cleanup(compiled.cleanup)
    os.environ.setdefault('NUMBA_CACHE_DIR', compiled.name)


def pytest_itemcollected(item: pytest.Item) -> None:
    mark(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    GUARD.closed = item.get_closest_marker('server') is None
    result = yield
    GUARD.closed = False
    return result


@pytest.fixture(scope='session')
def make_checkpoint(tmp_path_factory) -> MakeCheckpoint:
    """``make_checkpoint(llm=..., vit=..., flash=..., dtype=...)``: a tiny checkpoint, shared and not to be changed."""
    from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint

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
def cuda(monkeypatch) -> Any:
    """``torch.cuda`` as the vision side uses it, done on the CPU and noted: a StandInCuda."""
    from stand_in_cuda import StandInCuda

    stand_in = StandInCuda()
    stand_in.install(monkeypatch)
    return stand_in


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def rows_apart(monkeypatch) -> None:
    """Has Triton's interpreter, if it runs, multiply row by row.

    On a GPU every row of a block is summed alike. The interpreter leaves the product to numpy, whose BLAS may sum a row
    differently depending on its place, on some processors: nothing that a kernel could do about.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *precision):
        rows = np.split(a.data, a.data.shape[-2], axis=-2)
        product = np.concatenate([np.matmul(row, b.data, dtype=d.data.dtype) for row in rows], axis=-2)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, 'create_dot', create_dot)


@pytest.fixture(scope='session')
def prompts(pictures) -> dict[str, list[dict]]:
    """The conversations by name, with PIL images."""
    return conversations(pictures)


@pytest.fixture(scope='session')
def judge(make_checkpoint) -> Callable[..., Any]:
    """``judge(llm=..., vit=...)``: the judge of a tiny checkpoint's answers."""
    from parity.judge import Judge

    judges: dict[Path, Judge] = {}

    def get(**kind: Any) -> Judge:
        path = make_checkpoint(**kind)
        if path not in judges:
            judges[path] = Judge(path)
        return judges[path]

    return get
