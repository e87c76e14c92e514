"""Headers that we write are those that safetensors reads, and the other way round."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lmdeploy_vico.checkpoints.safetensors_format import StoredTensor, header_bytes, read_header


@pytest.mark.parametrize('metadata', [{}, {'format': 'pt'}], ids=['no metadata', 'metadata'])
def test_safetensors_reads_what_is_written(tmp_path, metadata):
    values = {'a': torch.arange(6, dtype=torch.int16).view(2, 3), 'b': torch.tensor(2.5), 'c': torch.ones(0, 4)}
    tensors = {
        'a': StoredTensor('I16', (2, 3), 0, 12),
        'b': StoredTensor('F32', (), 12, 16),
        'c': StoredTensor('F32', (0, 4), 16, 16),
    }
    header = header_bytes(tensors, metadata)
    assert len(header) % 8 == 0
    path = tmp_path / 'written.safetensors'
    path.write_bytes(header + b''.join(value.numpy().tobytes() for value in values.values()))
    with safe_open(path, framework='pt') as file:
        assert (file.metadata() or {}) == metadata
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())
    with path.open('rb') as file:
        assert read_header(file) == (tensors, metadata)
        assert file.tell() == len(header)


def test_what_safetensors_writes_is_read(tmp_path):
    values = {'first': torch.randn(3, 5).bfloat16(), 'second': torch.randn(7), 'third': torch.ones(2, dtype=torch.bool)}
    save_file(values, tmp_path / 'theirs.safetensors', metadata={'format': 'pt'})
    with (tmp_path / 'theirs.safetensors').open('rb') as file:
        tensors, metadata = read_header(file)
        begin = file.tell()
        file.seek(begin + tensors['second'].start)
        data = file.read(tensors['second'].nbytes)
    assert metadata == {'format': 'pt'}
    assert {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors.items()} == {
        'first': ('BF16', (3, 5), 30),
        'second': ('F32', (7,), 28),
        'third': ('BOOL', (2,), 2),
    }
    assert data == values['second'].numpy().tobytes()


def test_names_and_headers_need_no_torch():
    """The benchmark, an HTTP client, uses them."""
    code = 'import sys, lmdeploy_vico.checkpoints.names, lmdeploy_vico.checkpoints.safetensors_format\n'
    code += "print(sorted({'torch', 'safetensors', 'lmdeploy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
