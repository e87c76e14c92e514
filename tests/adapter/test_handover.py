"""Visual tokens reach the engine's process unchanged, at the cost of their bytes."""

import gc
import os
import pickle
import platform
import subprocess
import sys

import pytest
import torch

from lmdeploy_vico.adapter import handover
from lmdeploy_vico.adapter.engine.chat_model import MODALITY, SpanProcessor
from lmdeploy_vico.adapter.engine.spans import VisualSpan
from lmdeploy_vico.adapter.handover import PackedRows, Span

pytestmark = pytest.mark.filterwarnings('error')

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CUTS = [(0, 5), (5, 69), (69, 100)]


def embeddings(dtype=torch.bfloat16):
    return torch.randn(100, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def spans(image):
    return [Span(PackedRows.of(image[low:high]), low, high, content_hash=str(low)) for low, high in CUTS]


def sent(spans):
    return pickle.loads(pickle.dumps(spans))


@pytest.mark.parametrize('transfer', [sent, list], ids=['pickled', 'in process'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_round_trip(dtype, transfer):
    image = embeddings(dtype)
    for (low, high), span in zip(CUTS, transfer(spans(image)), strict=True):
        tensor = span.embeddings.tensor()
        assert tensor.dtype == dtype and torch.equal(tensor, image[low:high])


@pytest.mark.parametrize(
    'image',
    [embeddings().T.contiguous().T, embeddings().repeat(2, 2)[::2, 24:], embeddings().requires_grad_()],
    ids=['transposed', 'strided', 'with gradient'],
)
def test_any_strides(image):
    [*_, last] = sent(spans(image))
    assert torch.equal(last.embeddings.tensor(), image.detach()[69:100])


def test_bit_patterns_survive():
    image = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)  # NaNs among them
    rows = sent([PackedRows.of(image)])[0].tensor()
    assert torch.equal(rows.view(torch.int16), image.view(torch.int16))


def test_a_pickle_has_the_size_of_the_image():
    image = embeddings()
    assert image.nbytes < len(pickle.dumps(spans(image))) < image.nbytes + 1000


def test_tensors_have_memory_of_their_own():
    received = sent(spans(embeddings()))
    first, second = (span.embeddings.tensor() for span in received[:2])
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before)
    assert first.untyped_storage().nbytes() == first.nbytes and second.untyped_storage().nbytes() == second.nbytes


def test_a_tensor_outlives_what_it_was_made_of_and_can_be_sent_on():
    received = sent(spans(embeddings()))
    tensors = [span.embeddings.tensor() for span in received]
    del received
    gc.collect()
    again = [pickle.loads(pickle.dumps(tensor)) for tensor in tensors]
    shared = [tensor.clone().share_memory_() for tensor in tensors]
    for made in (tensors, again, shared):
        assert torch.equal(torch.cat(made), embeddings())


def test_arriving_rows_are_not_copied():
    rows = PackedRows.of(embeddings())
    assert rows.tensor().data_ptr() == rows.tensor().data_ptr()


PICKLING = """
import ctypes, pickle, resource, sys
from lmdeploy_vico.adapter.handover import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault instead of 512

way, *sizes = sys.argv[1:]
if way == 'kept':
    keep_freed_memory()
for size in map(int, sizes):
    spans = [bytes([number]) * 2**19 for number in range(2 * size)]
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first, second = pickle.dumps(spans), pickle.dumps(spans)
        del first, second
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
"""

THREADS = """
import os, threading
from pathlib import Path
from lmdeploy_vico.adapter.handover import KEPT, keep_freed_memory

def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

def allocate(megabytes):
    blocks = [bytes([1]) * (megabytes * 2**20) for _ in range(2)]
    held.append(sum(map(len, blocks)))

keep_freed_memory()
held, before = [], resident()
for megabytes in (20, 60, 100):
    threads = [threading.Thread(target=allocate, args=(megabytes,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    allocate(megabytes)
assert sum(held) == 6 * 180 * 2**20, held
assert resident() < before + 3 * KEPT, (before, resident())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='about the GNU C library')


def in_a_process(program, *arguments):
    """What it prints, where no setting of the C library comes from outside."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
    command = [sys.executable, '-c', program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout


@glibc
def test_the_memory_of_a_large_pickle_is_kept_for_the_next():
    """Of 20 MiB, and of 32 MiB, above which glibc's own threshold never rises."""
    faults = {way: list(map(int, in_a_process(PICKLING, way, '20', '32').split())) for way in ('kept', 'left alone')}
    assert min(faults['left alone']) > 2500 and max(faults['kept']) < 100, faults


@glibc
def test_threads_still_get_blocks_of_any_size_and_peaks_go_back():
    in_a_process(THREADS)


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(handover.ctypes, 'CDLL', lambda name: object())
    handover.keep_freed_memory.__wrapped__()


def test_the_engine_makes_tensors_of_them():
    image = embeddings()
    result = SpanProcessor().preprocess_input([1] * 100, sent(spans(image)))
    made = result.input_multimodals[MODALITY]
    assert {type(span) for span in made} == {VisualSpan}, 'workers would get pickled tensors'
    assert torch.equal(torch.cat([span.data for span in made]), image)
    assert [(span.start, span.end, span.content_hash) for span in made] == [(low, high, str(low)) for low, high in CUTS]
