"""The three operations under kernels/ and the whole router, against torch, LMDeploy 0.18 and what the hardware allows.

For each number of tiles and ViT width: ours (the implementation that would be chosen on this machine), the torch
reference, LMDeploy's own modules doing the same, and the floor, from the fewest bytes and operations over the bandwidth
and rate measured in the same run. "graph" is ours replayed as a CUDA graph: without the host's launches. Results are
checked before they are timed. On a CPU, few tiles and float32: enough to see that everything runs.

    make bench-kernels                   # prints the table
    ... --benchmark-json=results.json    # and keeps it, with device, versions and commit
"""

import pytest
import torch
from lmdeploy.pytorch.models.internvl import CrossAttentionPooling, InternVLChatModel
from lmdeploy.pytorch.models.internvl import Gating as LMDeployGating
from torch import nn

from benchmarks.timing import clock, graphed, interleaved, measure_ceilings
from lmdeploy_vico.kernels.attention_pool import attention_pool, attention_pool_torch
from lmdeploy_vico.kernels.pack import pack, pack_torch
from lmdeploy_vico.kernels.pixel_shuffle import Norm, pixel_shuffle, pixel_shuffle_torch
from lmdeploy_vico.vision.router import AttentionPooling, Gating

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device('cuda'), torch.bfloat16) if CUDA else (torch.device('cpu'), torch.float32)
TOLERANCE = 1e-2 if CUDA else 1e-5  # relative norm error of a result
SCORE_TOLERANCE = 2e-3
SHAPES = (
    [(width, tiles) for width in (1024, 3200) for tiles in (1, 10, 13, 64, 256)] if CUDA else [(1024, 1), (1024, 3)]
)
HEADS, PATCHES, LLM_WIDTH = 16, 1024, 4096
ITEM = DTYPE.itemsize

pytestmark = pytest.mark.benchmark(timer=clock(), min_rounds=5, max_time=0.2, warmup=False)


@pytest.fixture(scope='module')
def ceilings():
    return measure_ceilings(DEVICE, DTYPE)


@pytest.fixture(scope='module', params=SHAPES, ids=lambda shape: f'D={shape[0]}-{shape[1]}-tiles')
def shape(request):
    return request.param


@pytest.fixture(scope='module')
def x(shape):
    """Patch tokens as the ViT leaves them: the class token is skipped by a view."""
    width, tiles = shape
    torch.manual_seed(20)
    return torch.randn(tiles, PATCHES + 1, width, device=DEVICE, dtype=DTYPE)[:, 1:]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def report(benchmark, shape, ceilings):
    """``report(operation, competitors, moved, flops)``: time "ours" and the others in turns, and fill in the row."""

    def run(operation, competitors, moved, flops=0.0):
        if CUDA:
            competitors = {'ours': competitors['ours'], 'graph': graphed(competitors['ours']), **competitors}
        timings = interleaved(competitors, seconds=0.3)
        floor = ceilings.floor(moved, flops)
        benchmark.extra_info.update(
            operation=operation,
            width=shape[0],
            tiles=shape[1],
            competitors={name: vars(timing) for name, timing in timings.items()},
            moved_bytes=moved,
            flops=flops,
            floor=floor,
            bandwidth_share=moved / timings['ours'].median / ceilings.bandwidth,
            ceilings=vars(ceilings),
        )
        benchmark(competitors['ours'])

    return run


def check(result, expected, tolerance=TOLERANCE):
    error = (result.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f'wrong by {error:.1e}'


def some(tiles):
    return sorted({0, tiles // 2, tiles - 1})


def test_attention_pool(x, shape, report):
    width, tiles = shape
    u = torch.randn(tiles, HEADS, width, device=DEVICE) / width**0.5

    def cublas():
        weights = torch.softmax(torch.bmm(u.to(DTYPE), x.transpose(1, 2)).float(), dim=-1).to(DTYPE)
        return torch.bmm(weights, x)

    competitors = {
        'ours': lambda: attention_pool(x, u),
        'torch': lambda: attention_pool_torch(x, u, 1.0),
        'cublas': cublas,
    }
    for index in some(tiles):
        tokens = x[index].double()
        expected = torch.softmax(u[index].double() @ tokens.T, -1) @ tokens
        for run in competitors.values():
            check(run()[index], expected)
    moved = tiles * (PATCHES * width * ITEM + 2 * HEADS * width * 4)
    report('attention_pool', competitors, moved, 4 * tiles * HEADS * PATCHES * width)


def test_router(x, shape, report):
    width, tiles = shape
    torch.manual_seed(21)
    theirs = [module.to(DEVICE, DTYPE) for module in (CrossAttentionPooling(width), LMDeployGating(width))]
    with torch.device('meta'):
        ours = [AttentionPooling(width).to(DTYPE), Gating(width).to(DTYPE)]
    for mine, other in zip(ours, theirs, strict=True):
        mine.load_state_dict(other.state_dict(), strict=False, assign=True)
    for module in ours:
        module.prepare()

    def lmdeploy():
        return theirs[1](theirs[0](list(x)))

    competitors = {'ours': lambda: ours[1](ours[0](x)), 'lmdeploy': lmdeploy}
    exact = [module.double() for module in (CrossAttentionPooling(width), LMDeployGating(width))]
    for module, other in zip(exact, theirs, strict=True):
        module.to(DEVICE).load_state_dict(other.state_dict())
    subset = some(tiles)
    expected = exact[1](exact[0](list(x[subset].double())))[:, 0]
    assert (competitors['ours']()[subset, 0].double() - expected).abs().max() <= SCORE_TOLERANCE
    # Weights of two attentions (the second is used three times), of the gate, and four passes over x.
    weights = (8 * width**2 + 32 * width**2) * ITEM
    moved = 4 * tiles * PATCHES * width * ITEM + weights
    report('router', competitors, moved, tiles * (4 * (4 * PATCHES * width * HEADS + 8 * width**2) + 64 * width**2))


def test_pixel_shuffle(x, shape, report):
    width, tiles = shape
    compressed = torch.arange(tiles, device=DEVICE) % 2 == 1
    layers = [nn.LayerNorm(ratio**2 * width, device=DEVICE, dtype=DTYPE) for ratio in (2, 4)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    norms = [Norm(layer.weight, layer.bias) for layer in layers]
    room = (tiles - tiles // 2, tiles // 2)

    def lmdeploy():
        side = int(PATCHES**0.5)
        image = x.reshape(tiles, side, side, width)
        return [
            layer(InternVLChatModel.pixel_shuffle(None, image, 1 / ratio).flatten(1, 2))
            for layer, ratio in zip(layers, (2, 4), strict=True)
        ]

    competitors = {
        'ours': lambda: pixel_shuffle(x, compressed, *norms, 1e-5, room),
        'torch': lambda: pixel_shuffle_torch(x, compressed, *norms, 1e-5, room),
        'lmdeploy': lmdeploy,
    }
    doubles = [Norm(*(part.double() for part in norm)) for norm in norms]
    for name in ('ours', 'torch'):
        result = competitors[name]()
        for index in some(tiles):
            expected = pixel_shuffle_torch(
                x[index : index + 1].double(), compressed[index : index + 1], *doubles, 1e-5, (1, 1)
            )
            branch, rows = index % 2, PATCHES // (16 if index % 2 else 4)
            check(result[branch][index // 2 * rows : (index // 2 + 1) * rows], expected[branch][:rows])
    moved = 2 * x.numel() * ITEM + 2 * (4 + 16) * width * ITEM
    report('pixel_shuffle', competitors, moved)


def test_pack(shape, report):
    width, tiles = shape
    if width != 1024:
        pytest.skip('does not depend on the width of the ViT')
    lengths = [64 if tile % 2 else 256 for tile in range(tiles)]
    text = 64  # tokens between two tiles
    sources = [torch.randn(length, LLM_WIDTH, device=DEVICE, dtype=DTYPE) for length in lengths]
    starts = [sum(lengths[:tile]) + (tile + 1) * text for tile in range(tiles)]
    rows = sum(lengths) + (tiles + 1) * text
    embeddings = torch.randn(rows, LLM_WIDTH, device=DEVICE, dtype=DTYPE)
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    expected = embeddings.clone()
    for source, start in zip(sources, starts, strict=True):
        mask[start : start + len(source)] = True
        expected[start : start + len(source)] = source
    outputs = {name: embeddings.clone() for name in ('ours', 'torch', 'lmdeploy')}
    competitors = {
        'ours': lambda: pack(outputs['ours'], sources, starts),
        'torch': lambda: pack_torch(outputs['torch'], sources, starts),
        'lmdeploy': lambda: outputs['lmdeploy'].masked_scatter_(mask[:, None], torch.cat(sources)),
    }
    for name, run in competitors.items():
        run()
        assert torch.equal(outputs[name], expected), name
    report('pack', competitors, 2 * sum(lengths) * LLM_WIDTH * ITEM)
