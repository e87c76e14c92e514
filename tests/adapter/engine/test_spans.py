"""Spans leave the engine's process for its workers unchanged, at the cost of their bytes."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from lmdeploy.pytorch.model_inputs import VisionModelInputs
from lmdeploy.pytorch.multimodal.data_type import MultiModalData
from ray import cloudpickle
from ray_cluster import own_cluster
from waiting import HANG

from lmdeploy_vico.adapter.engine.spans import VisualSpan, beside_the_loop, carries_spans

pytestmark = pytest.mark.filterwarnings('error')  # torch warns of tensors in memory that must not be written to

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]


def rows(dtype=torch.bfloat16, shape=(65, 23)):
    return (100 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))).abs().to(dtype)


def span_of(data):
    return VisualSpan(data=data, start=7, end=7 + len(data), meta={'tiles': [256]}, content_hash='abc')


def by_protocol(number):
    return lambda value: pickle.loads(pickle.dumps(value, protocol=number))


def by_ray(value):
    """As Ray does: buffers apart, in its store, which the receiver may only read."""
    buffers = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[memoryview(bytes(buffer)) for buffer in buffers])


def by_the_same_memory(value):
    """Buffers apart, and writable, but still the sender's."""
    buffers = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=buffers)


WAYS = {
    'protocol 2': by_protocol(2),
    'protocol 4': by_protocol(4),
    'protocol 5': by_protocol(5),
    'Ray': by_ray,
    'the same memory': by_the_same_memory,
    'copy': copy.copy,
    'deep copy': copy.deepcopy,
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def sent(request):
    return request.param


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(65, 23), (1, 1), (64, 128), (0, 8)], ids=str)
def test_what_arrives_is_what_was_sent(dtype, shape, sent):
    span = span_of(rows(dtype, shape))
    got = sent(span)
    assert type(got) is VisualSpan and type(got.data) is torch.Tensor
    assert got.data.dtype == dtype and torch.equal(got.data, span.data)
    assert replace(got, data=None) == replace(span, data=None)


@pytest.mark.parametrize(
    'data',
    [rows().T, rows()[::2, 3:], rows()[3:9], rows().requires_grad_()],
    ids=['transposed', 'strided', 'cut', 'grad'],
)
def test_any_strides(data, sent):
    assert torch.equal(sent(span_of(data)).data, data.detach())


def test_bit_patterns_survive(sent):
    image = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)  # NaNs among them
    assert torch.equal(sent(span_of(image)).data.view(torch.int16), image.view(torch.int16))


@pytest.mark.parametrize(
    'sent', [way for name, way in WAYS.items() if name != 'Ray'], ids=[name for name in WAYS if name != 'Ray']
)
def test_what_arrives_can_be_written_to_and_is_nobody_elses(sent):
    span = span_of(rows())
    first, second = sent(span), sent(span)
    before = span.data.clone()
    first.data.zero_()
    assert torch.equal(span.data, before) and torch.equal(second.data, before)
    assert second.data.untyped_storage().nbytes() == second.data.nbytes


def test_what_arrives_by_ray_lies_in_its_store_and_is_kept_there():
    span, buffers = span_of(rows()), []
    data = cloudpickle.dumps(span, protocol=5, buffer_callback=buffers.append)
    store = np.frombuffer(bytes(buffers[0]), np.uint8)
    freed = threading.Event()
    weakref.finalize(store, freed.set)
    got = pickle.loads(data, buffers=[memoryview(store)])
    assert got.data.data_ptr() == store.ctypes.data
    del store
    gc.collect()
    assert not freed.is_set() and torch.equal(got.data, span.data)
    part = got.data[3:]
    del got
    gc.collect()
    assert not freed.is_set() and torch.equal(part, span.data[3:])
    del part
    gc.collect()
    assert freed.is_set()


@pytest.mark.slow
def test_rays_store_keeps_what_is_still_read(tmp_path):
    """The object is gone for Ray, and others want its place: in a store of 256 MiB."""
    spans = [span_of(rows(shape=(64, 4096))) for _ in range(40)]
    with own_cluster(tmp_path):
        held = ray.put(spans)
        got = ray.get(held)
        del held
        for turn in range(20):
            ray.get(ray.put(np.full(64 << 20, turn, np.uint8)))
        assert all(torch.equal(one.data, span.data) for one, span in zip(got, spans, strict=True))
        del got


def inputs_with(*multimodals):
    return {'inputs': SimpleNamespace(vision_inputs=VisionModelInputs(input_multimodals=list(multimodals)))}


@pytest.mark.parametrize(
    ('inputs', 'carries'),
    [
        ({'inputs': None, 'delta': object()}, False),
        ({'inputs': SimpleNamespace(vision_inputs=None)}, False),
        ({'inputs': SimpleNamespace(vision_inputs=VisionModelInputs())}, False),
        (inputs_with(None, {}), False),
        (inputs_with({'image': []}), False),
        (inputs_with({}, {'image': [span_of(rows())]}), True),
    ],
    ids=['a decoding step', 'text', 'no pictures', 'nothing for a prompt', 'no spans', 'spans'],
)
def test_steps_with_visual_tokens_are_known(inputs, carries):
    assert carries_spans(inputs) is carries


def test_work_beside_the_loop_leaves_the_loop_to_others():
    """The work ends only after the loop has done something else."""
    others = threading.Event()

    async def work():
        assert others.wait(HANG)
        await asyncio.sleep(0)
        return 'done'

    async def serve():
        asyncio.get_running_loop().call_soon(others.set)
        return await beside_the_loop(work())

    assert asyncio.run(serve()) == 'done'


def test_positions_are_those_of_the_moment():
    """LMDeploy adds the length of the history to them in place."""
    span = span_of(rows())
    span.start += 64
    span.end += 64
    got = by_ray(span)
    assert (got.start, got.end) == (71, 136)


def test_a_tensor_that_is_loaded_is_not_copied_again():
    """A bytearray, which an unpickler makes of a buffer in the pickle, is the tensor's memory."""
    span = span_of(rows())
    function, (data, *rest) = span.__reduce_ex__(5)
    assert data.raw().obj.ctypes.data == span.data.data_ptr(), 'pickling must not copy'
    made = bytearray(data)
    loaded = function(made, *rest)
    loaded.data.zero_()
    assert made == bytes(len(made))


def test_the_pickle_has_the_size_of_the_rows_and_with_buffers_apart_next_to_none():
    spans = [span_of(rows(shape=(64, 512))) for _ in range(40)]
    size = sum(span.data.nbytes for span in spans)
    assert size < len(pickle.dumps(spans, protocol=5)) < size + 40 * 200
    buffers = []
    assert len(pickle.dumps(spans, protocol=5, buffer_callback=buffers.append)) < 40 * 200
    assert len(buffers) == 40


def test_lmdeploy_moves_them_as_its_own():
    spans = [span_of(rows()), span_of(rows(torch.float32))]
    inputs = by_ray(VisionModelInputs(input_multimodals=[{'image': spans}, {}]))
    moved = inputs.to_device('cpu')
    inputs.record_stream(None)
    for span, got in zip(spans, moved.input_multimodals[0]['image'], strict=True):
        assert type(got) is MultiModalData
        assert torch.equal(got.data, span.data) and (got.start, got.end) == (span.start, span.end)
    on_meta = span_of(rows()).to_device('meta')
    assert on_meta.data.is_meta and on_meta.data.shape == (65, 23)
