"""The operations under kernels/ and the whole router, against torch, LMDeploy 0.18 and what the hardware allows.

For each number of tiles and ViT width: ours (the implementation that would be chosen on this machine), the torch
reference, LMDeploy's own modules doing the same, and the floor, from the fewest bytes and operations over the bandwidth
and rate measured in the same run. "graph" is ours replayed as a CUDA graph: without the host's launches. Our results
are checked before they are timed. Data come from memory, not from caches: each call finds other data than the last. On
a CPU, few tiles and float32: enough to see that everything runs.

    make bench-kernels                   # prints the table
    ... --benchmark-json=results.json    # and keeps it, with device, versions and commit
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from lmdeploy.pytorch.models.internvl import CrossAttentionPooling, InternVLChatModel
from lmdeploy.pytorch.models.internvl import Gating as LMDeployGating
from torch import nn

from benchmarks.lib.timing import clock, graphed, interleaved, measure_ceilings, rotating
from lmdeploy_vico.config import GRID, TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.config import ROUTER_HEADS as HEADS
from lmdeploy_vico.kernels.attention_pool import attention_pool, attention_pool_torch
from lmdeploy_vico.kernels.pack import pack, pack_torch
from lmdeploy_vico.kernels.pixel_shuffle import Norm, pixel_shuffle, pixel_shuffle_torch
from lmdeploy_vico.kernels.residual_norm import norm, residual_norm
from lmdeploy_vico.vision.model.router import AttentionPooling, Gating

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device('cuda'), torch.bfloat16) if CUDA else (torch.device('cpu'), torch.float32)
TOLERANCE = 1e-2 if CUDA else 1e-5  # relative norm error of a result
SCORE_TOLERANCE = 2e-3
SHAPES = (
    [(width, tiles) for width in (1024, 3200) for tiles in (1, 10, 13, 64, 256)] if CUDA else [(1024, 1), (1024, 3)]
)
PATCHES, LLM_WIDTH = GRID * GRID, 4096
ITEM = DTYPE.itemsize
CACHES = 2**28 if CUDA else 1  # bytes that are more than any cache holds

pytestmark = pytest.mark.benchmark(timer=clock(), min_rounds=5, max_time=0.2, warmup=False)


@pytest.fixture(scope='module')
def ceilings():
    return measure_ceilings(DEVICE, DTYPE)


@pytest.fixture(scope='module', params=SHAPES, ids=lambda shape: f'D={shape[0]}-{shape[1]}-tiles')
def shape(request):
    return request.param


@pytest.fixture(scope='module')
def xs(shape):
    """Sets of patch tokens as the ViT leaves them, the class token skipped by a view; more than caches hold."""
    width, tiles = shape
    torch.manual_seed(20)
    sets = sets_beyond_caches(tiles * PATCHES * width * ITEM)
    return [torch.randn(tiles, PATCHES + 1, width, device=DEVICE, dtype=DTYPE)[:, 1:] for _ in range(sets)]


def sets_beyond_caches(size):
    """How many sets of so many bytes are more than the caches hold; at most 64."""
    return min(64, -(-CACHES // size))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def report(benchmark, shape, ceilings):
    """``report(operation, competitors, sets, moved, flops)``: time "ours" and the others in turns, fill in the row.

    Competitors are called with the number of a set of data; bytes moved and operations are those of one set.
    """

    def run(operation, competitors, sets, moved, flops=0.0, capturable=True):
        turns = {name: rotating(function, sets) for name, function in competitors.items()}
        if CUDA and capturable:
            turns = {'ours': turns['ours'], 'graph': graphed(turns['ours']), **turns}
        timings = {name: timing.per(sets) for name, timing in interleaved(turns, seconds=0.3).items()}
        floor = ceilings.floor(moved, flops)
        benchmark.extra_info.update(
            operation=operation,
            width=shape[0],
            tiles=shape[1],
            competitors={name: vars(timing) for name, timing in timings.items()},
            sets=sets,
            moved_bytes=moved,
            flops=flops,
            floor=floor,
            bandwidth_share=moved / timings.get('graph', timings['ours']).median / ceilings.bandwidth,
            ceilings=vars(ceilings),
        )
        benchmark(turns['ours'])

    return run


def check(result, expected, tolerance=TOLERANCE):
    error = (result.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f'wrong by {error:.1e}'


def some(tiles):
    return sorted({0, tiles // 2, tiles - 1})


def test_attention_pool(xs, shape, report):
    width, tiles = shape
    u = torch.randn(tiles, HEADS, width, device=DEVICE) / width**0.5

    def cublas(index):
        weights = torch.softmax(torch.bmm(u.to(DTYPE), xs[index].transpose(1, 2)).float(), dim=-1).to(DTYPE)
        return torch.bmm(weights, xs[index])

    competitors = {
        'ours': lambda index: attention_pool(xs[index], u),
        'torch': lambda index: attention_pool_torch(xs[index], u, 1.0),
        'cublas': cublas,
    }
    for tile in some(tiles):
        tokens = xs[0][tile].double()
        expected = torch.softmax(u[tile].double() @ tokens.T, -1) @ tokens
        for run in competitors.values():
            check(run(0)[tile], expected)
    moved = tiles * (PATCHES * width * ITEM + 2 * HEADS * width * 4)
    report('attention_pool', competitors, len(xs), moved, 4 * tiles * HEADS * PATCHES * width)


@cache
def routers(width):
    """LMDeploy's router, ours with its weights, and it in float64: made once for a width, on the device."""
    torch.manual_seed(21)
    with torch.device(DEVICE):
        theirs = [module(width).to(DTYPE) for module in (CrossAttentionPooling, LMDeployGating)]
    exact = [deepcopy(module).double() for module in theirs]
    with torch.device('meta'):
        ours = [AttentionPooling(width).to(DTYPE), Gating(width).to(DTYPE)]
    for mine, other in zip(ours, theirs, strict=True):
        # Copies, since the absorbed router brings its norms to float32.
        mine.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, strict=False, assign=True)
        assert isinstance(mine, AttentionPooling | Gating)
        mine.freeze()
    return theirs, ours, exact


def test_router(xs, shape, report):
    width, tiles = shape
    theirs, ours, exact = routers(width)

    competitors = {
        'ours': lambda index: ours[1](ours[0](xs[index])),
        'lmdeploy': lambda index: theirs[1](theirs[0](list(xs[index]))),
    }
    subset = some(tiles)
    expected = exact[1](exact[0](list(xs[0][subset].double())))[:, 0]
    assert (competitors['ours'](0)[subset, 0].double() - expected).abs().max() <= SCORE_TOLERANCE
    # Four passes over x, and of the weights: values and output of the first attention, whose absorbed query is there
    # from the start, the second attention (used three times but small enough to stay in the L2 cache), the gate.
    moved = 4 * tiles * PATCHES * width * ITEM + (2 + 4 + 32) * width**2 * ITEM
    flops = tiles * (4 * 4 * PATCHES * width * HEADS + (2 + 3 * 4 + 32) * 2 * width**2)
    report('router', competitors, len(xs), moved, flops)


def test_pixel_shuffle(xs, shape, report):
    width, tiles = shape
    compressed = torch.arange(tiles, device=DEVICE) % 2 == 1
    layers = [nn.LayerNorm(ratio**2 * width, device=DEVICE, dtype=DTYPE) for ratio in (2, 4)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    full, compressing = (Norm(layer.weight, layer.bias) for layer in layers)
    room = (tiles - tiles // 2, tiles // 2)

    def lmdeploy(index):
        side = int(PATCHES**0.5)
        image = xs[index].reshape(tiles, side, side, width)
        return [
            layer(InternVLChatModel.pixel_shuffle(None, image, 1 / ratio).flatten(1, 2))
            for layer, ratio in zip(layers, (2, 4), strict=True)
        ]

    competitors = {
        'ours': lambda index: pixel_shuffle(xs[index], compressed, full, compressing, 1e-5, room),
        'torch': lambda index: pixel_shuffle_torch(xs[index], compressed, full, compressing, 1e-5, room),
        'lmdeploy': lmdeploy,
    }
    exact_full, exact_compressing = (Norm(*(part.double() for part in norm)) for norm in (full, compressing))
    for name in ('ours', 'torch'):
        result = competitors[name](0)
        for tile in some(tiles):
            alone = slice(tile, tile + 1)
            expected = pixel_shuffle_torch(
                xs[0][alone].double(), compressed[alone], exact_full, exact_compressing, 1e-5, (1, 1)
            )
            branch, rows = tile % 2, PATCHES // (16 if tile % 2 else 4)
            check(result[branch][tile // 2 * rows : (tile // 2 + 1) * rows], expected[branch][:rows])
    moved = 2 * xs[0].numel() * ITEM + 2 * (4 + 16) * width * ITEM
    report('pixel_shuffle', competitors, len(xs), moved)


def affine(width):
    """Layer scale, weight and bias of a ViT of this width; None for the bias of an RMSNorm."""
    scale, weight, bias = (torch.randn(width, device=DEVICE, dtype=DTYPE) for _ in range(3))
    return scale, weight, bias if width == 1024 else None


def plain_norm(x, weight, bias):
    """As the ViT's blocks have it."""
    if bias is None:
        return nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
    return nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)


def test_residual_norm(xs, shape, report):
    width, tiles = shape
    scale, weight, bias = affine(width)
    deltas = [torch.randn_like(x) for x in xs]

    def plain(index):
        hidden = xs[index] + deltas[index] * scale
        return hidden, plain_norm(hidden, weight, bias)

    competitors = {
        'ours': lambda index: residual_norm(xs[index], deltas[index], scale, weight, bias, 1e-6),
        'torch': plain,
    }
    for tile in some(tiles):
        x, delta = xs[0][tile].double(), deltas[0][tile].double()
        hidden = x + delta * scale.double()
        expected = hidden, plain_norm(hidden, weight.double(), None if bias is None else bias.double())
        for run in competitors.values():
            for result, right in zip(run(0), expected, strict=True):
                check(result[tile], right)
    report('residual_norm', competitors, len(xs), 4 * xs[0].numel() * ITEM)


def test_strided_norm(xs, shape, report):
    """q of a fused projection, whose rows lie 3 * D apart."""
    width, tiles = shape
    _, weight, bias = affine(width)
    queries = [torch.randn(tiles, PATCHES, 3 * width, device=DEVICE, dtype=DTYPE).chunk(3, -1)[0] for _ in xs]
    competitors = {
        'ours': lambda index: norm(queries[index], weight, bias, 1e-6),
        'torch': lambda index: plain_norm(queries[index], weight, bias),
    }
    for tile in some(tiles):
        expected = plain_norm(queries[0][tile].double(), weight.double(), None if bias is None else bias.double())
        for run in competitors.values():
            check(run(0)[tile], expected)
    report('strided_norm', competitors, len(xs), 2 * xs[0].numel() * ITEM)


def test_pack(shape, report):
    width, tiles = shape
    if width != 1024:
        pytest.skip('does not depend on the width of the ViT')
    lengths = [TOKENS_COMPRESSED if tile % 2 else TOKENS_FULL for tile in range(tiles)]
    text = 64  # tokens between two tiles
    starts = [sum(lengths[:tile]) + (tile + 1) * text for tile in range(tiles)]
    rows = sum(lengths) + (tiles + 1) * text
    sets = sets_beyond_caches(sum(lengths) * LLM_WIDTH * ITEM)
    sources = [[torch.randn(length, LLM_WIDTH, device=DEVICE, dtype=DTYPE) for length in lengths] for _ in range(sets)]
    embeddings = torch.randn(rows, LLM_WIDTH, device=DEVICE, dtype=DTYPE)
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    expected = embeddings.clone()
    for source, start in zip(sources[0], starts, strict=True):
        mask[start : start + len(source)] = True
        expected[start : start + len(source)] = source
    # As in a prefill: where the sequence begins is known to the device only.
    offsets, groups = torch.zeros(1, dtype=torch.int64, device=DEVICE), [0] * tiles
    outputs = {name: [embeddings.clone() for _ in range(sets)] for name in ('ours', 'torch', 'lmdeploy')}
    competitors = {
        'ours': lambda index: pack(outputs['ours'][index], sources[index], starts, offsets, groups),
        'torch': lambda index: pack_torch(outputs['torch'][index], sources[index], starts, offsets, groups),
        'lmdeploy': lambda index: outputs['lmdeploy'][index].masked_scatter_(mask[:, None], torch.cat(sources[index])),
    }
    for name, run in competitors.items():
        run(0)
        assert torch.equal(outputs[name][0], expected), name
    # Not as a graph: each call sends a table of addresses from the host.
    report('pack', competitors, sets, 2 * sum(lengths) * LLM_WIDTH * ITEM, capturable=False)
