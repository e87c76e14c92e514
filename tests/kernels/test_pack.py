"""Packing against its rule, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_vico.kernels.pack import pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 3  # rows before and after out that nothing may touch
both = pytest.mark.usefixtures('kernels')


def signed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values that are normal numbers in every dtype, so that each row's relative error means something."""
    return rng.uniform(1, 2, shape) * rng.choice([-1, 1], shape)


@pytest.fixture(scope='session')
def check(device, float64, assert_close):
    """``check(rows, width, dtype, sources, starts, ...)``: each row of out is one that claims it, or as before."""

    def run(rows, width, dtype, sources, starts, offsets=None, groups=()):
        whole = torch.rand(GUARD + rows + GUARD, width).to(device, dtype)
        before = whole.clone()
        out = whole[GUARD : GUARD + rows]
        assert pack(out, sources, starts, offsets, groups) is out
        begins = [0] * len(starts) if offsets is None else [int(offsets[group]) for group in groups]
        claims = {}
        for source, start, begin in zip(sources, starts, begins, strict=True):
            for row, values in enumerate(source, start + begin):
                claims.setdefault(GUARD + row, []).append(values)
        for row, (now, then) in enumerate(zip(whole, before, strict=True)):
            claimed = claims.get(row, []) if GUARD <= row < GUARD + rows else []
            if not claimed:
                assert torch.equal(now, then)
            elif dtype in (torch.float32, claimed[0].dtype):  # nothing to round
                assert any(torch.equal(now, values.to(dtype)) for values in claimed)
            else:
                [values] = claimed
                assert_close(now, float64(values))

    return run


@pytest.fixture(scope='session')
def sources_of(inside):
    """``sources_of(lengths, width, dtype, rng)``: contiguous tensors between rows of NaN, not all of them aligned."""

    def make(lengths, width, dtype, rng):
        edges = [tuple(rng.integers(0, 3, 2)) for _ in lengths]
        values = [signed(rng, (length, width)) for length in lengths]
        return [inside(rows, dtype, (a, 0), (b, 0)) for rows, (a, b) in zip(values, edges, strict=True)]

    return make


WIDTHS = st.sampled_from([1, 3, 7, 8, 13, 16, 40, 64, 99, 256, 257])
LENGTHS = st.lists(st.integers(0, 40), max_size=6)


@both
@settings(settings.get_profile('kernels'), max_examples=40)
@given(
    lengths=LENGTHS,
    gaps=st.lists(st.integers(0, 5), min_size=7, max_size=7),
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    source_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_random(sources_of, check, lengths, gaps, width, dtype, source_dtype, seed):
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(lengths))
    starts, row = {}, gaps[-1]
    for place in places:
        starts[place] = row
        row += lengths[place] + gaps[place]
    sources = sources_of(lengths, width, source_dtype, rng)
    check(row, width, dtype, sources, [starts[index] for index in range(len(lengths))])


@both
@settings(settings.get_profile('kernels'), max_examples=40)
@given(
    lengths=LENGTHS,
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 120),
    sequences=st.integers(1, 4),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 999),
)
def test_random_with_offsets(sources_of, check, device, lengths, width, dtype, rows, sequences, offset_dtype, seed):
    rng = np.random.default_rng(seed)
    offsets = torch.from_numpy(rng.integers(-50, 150, sequences)).to(device, offset_dtype)
    starts, groups = rng.integers(-50, 60, len(lengths)).tolist(), rng.integers(0, sequences, len(lengths)).tolist()
    # Of out's dtype, so that rows which several sources claim are those of one of them exactly.
    check(rows, width, dtype, sources_of(lengths, width, dtype, rng), starts, offsets, groups)


@both
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('source_dtype', DTYPES, ids=str)
def test_sizes_of_models(sources_of, check, device, rng, dtype, source_dtype):
    sources = sources_of([64, 0, 16, 33], 4096, source_dtype, rng)
    check(140, 4096, dtype, sources, [70, 5, 0, 20])
    offsets = torch.tensor([-30, 90], device=device)
    check(140, 4096, dtype, sources, [0, 2, 40, -40], offsets, [0, 0, 1, 1])


@both
@pytest.mark.parametrize('width', [5, 64])
def test_rows_out_of_range_are_dropped(sources_of, check, device, rng, width):
    sources = sources_of([10, 10, 10, 10], width, torch.float32, rng)
    # The first two hang over an edge, the others lie so far outside that 32 bits would bring them back.
    offsets = torch.tensor([-4, 15, 2**32, -(2**32)], device=device)
    check(20, width, torch.float32, sources, [0, 0, 5, 5], offsets, [0, 1, 2, 3])


@both
def test_every_other_offset(sources_of, check, refused_or_right, device, rng):
    offsets = torch.tensor([0, 7, 20, 33, 40, 51], device=device)[::2]
    sources = sources_of([5, 5, 5], 8, torch.float32, rng)
    with refused_or_right('offsets: '):
        check(60, 8, torch.float32, sources, [0, 1, 2], offsets, [0, 1, 2])


@both
def test_groups_without_offsets(sources_of, check, refused_or_right, rng):
    sources = sources_of([5], 8, torch.float32, rng)
    with refused_or_right('groups: '):
        check(20, 8, torch.float32, sources, [2], None, [0, 0])


@both
def test_nothing_to_copy(device):
    out = torch.rand(5, 8, device=device)
    before = out.clone()
    empty = torch.rand(0, 8, device=device)
    assert torch.equal(pack(out, [], []), before)
    assert torch.equal(pack(out, [empty, empty], [0, 5]), before)
    assert pack(torch.rand(5, 0, device=device), [torch.rand(3, 0, device=device)], [1]).shape == (5, 0)


SOURCES = [torch.rand(4, 8), torch.rand(2, 8)]
OFFSETS = torch.tensor([0, 5])
BAD = {
    'out: one dimension': {'out': torch.rand(80)},
    'out: float64': {'out': torch.rand(10, 8).double()},
    'out: integers': {'out': torch.ones(10, 8, dtype=torch.int32)},
    'out: transposed': {'out': torch.rand(8, 10).T},
    'out: rows with gaps': {'out': torch.rand(10, 9)[:, :8]},
    'sources[1]: one dimension': {'sources': [SOURCES[0], torch.rand(8)]},
    'sources[1]: another width': {'sources': [SOURCES[0], torch.rand(2, 7)]},
    'sources[0]: integers': {'sources': [SOURCES[0].int(), SOURCES[1].int()]},
    'sources[0]: float64': {'sources': [SOURCES[0].double(), SOURCES[1].double()]},
    'sources[1]: another dtype than the first': {'sources': [SOURCES[0], SOURCES[1].half()]},
    'sources[1]: transposed': {'sources': [SOURCES[0], torch.rand(8, 2).T]},
    'sources[1]: rows with gaps': {'sources': [SOURCES[0], torch.rand(2, 9)[:, :8]]},
    'sources[1]: another device': {'sources': [SOURCES[0], SOURCES[1].to('meta')]},
    'starts: too few': {'starts': [0]},
    'starts: too many': {'starts': [0, 4, 8]},
    'starts[1]: negative': {'starts': [0, -1]},
    'starts[1]: a row too far': {'starts': [0, 9]},
    'offsets: floats': {'offsets': OFFSETS.float(), 'groups': [0, 1]},
    'offsets: int16': {'offsets': OFFSETS.short(), 'groups': [0, 1]},
    'offsets: two dimensions': {'offsets': OFFSETS[None], 'groups': [0, 0]},
    'offsets: another device': {'offsets': OFFSETS.to('meta'), 'groups': [0, 1]},
    'groups: none': {'offsets': OFFSETS},
    'groups: too many': {'offsets': OFFSETS, 'groups': [0, 1, 1]},
    'groups: one too high': {'offsets': OFFSETS, 'groups': [0, 2]},
    'groups: negative': {'offsets': OFFSETS, 'groups': [0, -1]},
}


@both
@pytest.mark.parametrize('case', BAD)
def test_names_a_bad_argument_and_leaves_out_alone(case):
    arguments = {'out': torch.rand(10, 8), 'sources': SOURCES, 'starts': [0, 5]} | BAD[case]
    before = arguments['out'].clone()
    name = case.split(':')[0].replace('[', r'\[')
    with pytest.raises(ValueError, match=f'^{name}: '):
        pack(**arguments)
    assert torch.equal(arguments['out'], before)
