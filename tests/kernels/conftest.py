"""Both implementations, poisoned memory and the one table of tolerances.

``TRITON_INTERPRET=1`` runs the Triton kernels on the CPU; ``VICO_TEST_DEVICE=cuda`` runs the same tests on a GPU.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

from lmdeploy_vico.kernels import implementation

DEVICE = torch.device(os.environ.get('VICO_TEST_DEVICE', 'cpu'))
# Largest ||out - reference|| / ||reference||, by the dtype of the result. The reference is computed in float64 from
# inputs rounded to the dtype under test.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# The same by the dtype of an operand: float32 ones that meet it in a product go in as two values of its type, which are
# 16 bits in bfloat16 (an error of 2 ** -15 where they are truncated, as in the interpreter, times the logit that they
# make), and in float16 nearly as many as float32 has.
SPLIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-5}
OPERATIONS = ('attention_pool', 'linear', 'pixel_shuffle', 'pack', 'residual_norm')
GUARD = 64  # elements around each poisoned tensor; a multiple of what vectorised accesses are aligned to

# The same examples in every run, so that a failure is a change of the code. In the interpreter, shrinking a failing one
# takes minutes, and they are small as they are.
settings.register_profile(
    'kernels', derandomize=True, deadline=None, database=None, max_examples=30, phases=[Phase.explicit, Phase.generate]
)


@pytest.fixture(scope='session')
def device() -> torch.device:
    if DEVICE.type == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    return DEVICE


@pytest.fixture(params=['torch', 'triton'])
def kernels(request, monkeypatch):
    """Runs the test with one implementation, while the other cannot be reached."""
    if request.param == 'triton' and (DEVICE.type == 'cpu') != implementation.INTERPRETED:
        pytest.skip("the Triton kernels run on CUDA, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1)")
    other = {'torch': 'triton', 'triton': 'torch'}[request.param]

    def unreachable(*args, **kwargs):
        raise AssertionError(f'{request.param} was asked for, and {other} runs')

    for operation in OPERATIONS:
        module = importlib.import_module(f'lmdeploy_vico.kernels.{operation}')
        monkeypatch.setattr(module, f'{operation}_{other}', unreachable)
    implementation.use(request.param)
    return request.param


@pytest.fixture(autouse=True)
def choice_restored():
    before = implementation.requested()
    yield
    implementation.use(before)


def poison_of(dtype: torch.dtype) -> float | int:
    return float('nan') if dtype.is_floating_point else torch.iinfo(dtype).max


def is_poison(tensor: torch.Tensor) -> bool:
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == poison_of(tensor.dtype)).all())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that nothing has been written to is NaN (integers: their largest), and writes beside a tensor are seen."""
    guarded = []

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args, **kwargs) -> torch.Tensor:
            plain = allocate(*args, **kwargs)
            countable = plain.is_floating_point() or plain.dtype in (torch.int32, torch.int64)
            if not countable or not plain.is_contiguous() or plain.is_pinned() or 0 in plain.shape:
                return plain
            numbers = prod(plain.shape)
            value = poison_of(plain.dtype)
            buffer = torch.full((numbers + 2 * GUARD,), value, dtype=plain.dtype, device=plain.device)
            guarded.extend([buffer[:GUARD], buffer[GUARD + numbers :]])
            return buffer[GUARD : GUARD + numbers].view(plain.shape)

        return empty

    for owner, name in ((torch, 'empty'), (torch, 'empty_like'), (torch.Tensor, 'new_empty')):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield
    assert all(is_poison(guard) for guard in guarded), 'a kernel wrote outside its output'


@pytest.fixture(scope='session')
def assert_close() -> Callable[..., None]:
    """``assert_close(out, expected, operand)``; operand is the dtype of a product's shorter side, if there is one."""

    def check(out: torch.Tensor, expected: np.ndarray, operand: torch.dtype = torch.float32) -> None:
        assert tuple(out.shape) == expected.shape
        tolerance = max(TOLERANCE[out.dtype], SPLIT_TOLERANCE[operand])
        error = np.linalg.norm(out.double().cpu().numpy() - expected)
        assert error <= tolerance * np.linalg.norm(expected)

    return check


@pytest.fixture(scope='session')
def inside(device) -> Callable[..., torch.Tensor]:
    """``inside(values, dtype, before=..., after=...)``: the values as a view into a larger tensor full of NaN.

    ``before`` and ``after`` say how many NaN precede and follow the values in each dimension.
    """

    def view(values: np.ndarray, dtype: torch.dtype, before: tuple[int, ...], after: tuple[int, ...]) -> torch.Tensor:
        widths = zip(before, values.shape, after, strict=True)
        whole = torch.full([sum(width) for width in widths], float('nan'), dtype=dtype, device=device)
        inner = whole[tuple(slice(first, first + size) for first, size in zip(before, values.shape, strict=True))]
        return inner.copy_(torch.from_numpy(values))

    return view


@pytest.fixture(scope='session')
def float64() -> Callable[[torch.Tensor], np.ndarray]:
    """A tensor's values, as rounded to its dtype, for a reference."""
    return lambda tensor: tensor.double().cpu().numpy()


@pytest.fixture(scope='session')
def refused_or_right():
    """``with refused_or_right(name):`` for what the contract leaves open: ValueError for the argument, or no error."""

    @contextmanager
    def allow(name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            assert str(error).startswith(name)

    return allow
