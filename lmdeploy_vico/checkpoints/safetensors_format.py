"""The safetensors file format: a header, then the tensors' bytes; and the index of a checkpoint of several files.

A file begins with eight bytes (the header's length, little-endian) and the header, a JSON object that gives every
tensor's type, shape and place. This module loads no torch.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmdeploy_vico.checkpoints.names import Shape

INDEX_FILE = 'model.safetensors.index.json'
SINGLE_FILE = 'model.safetensors'
# Types whose values are meaningful by themselves. A narrower one needs scales, which nothing here applies; a wider one
# is not published.
FLOATS = ('F32', 'F16', 'BF16')
_METADATA = '__metadata__'
_LENGTH = struct.Struct('<Q')
_ALIGNMENT = 8  # bytes: the tensors begin at a multiple


class DamagedFileError(ValueError):
    """A file is not a whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors names it: BF16, F8_E4M3, I32, ...
        shape: its shape.
        start, end: its place in bytes, counted from the end of the header.
    """

    dtype: str
    shape: Shape
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def read_header(file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read a header and leave ``file`` at the first tensor's bytes.

    Args:
        file: a safetensors file, at its beginning.

    Returns:
        The tensors by name, in the order of the header, and the file's metadata.

    Raises:
        DamagedFileError: the header is damaged, or the file is shorter or longer than the header says.
        OSError: the file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_LENGTH.size)
    length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
    if _LENGTH.size + length > size:
        raise DamagedFileError('the file ends before its header does')
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop(_METADATA, {})
        tensors = {name: _stored_tensor(entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f'the header is damaged ({type(error).__name__}: {error})') from error
    expected = _LENGTH.size + length + max((tensor.end for tensor in tensors.values()), default=0)
    if size != expected:
        raise DamagedFileError(f'the file has {size} bytes, and its header describes {expected}')
    return tensors, metadata


def _stored_tensor(entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry['data_offsets']
    return StoredTensor(str(entry['dtype']), tuple(entry['shape']), int(start), int(end))


def header_bytes(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything that a file has before its tensors' bytes, the eight bytes of length included.

    Args:
        tensors: by name.
        metadata: of the file; no entry is written if it is empty.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        offsets = [tensor.start, tensor.end]
        header[name] = {'dtype': tensor.dtype, 'shape': list(tensor.shape), 'data_offsets': offsets}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def index_text(files: Mapping[str, str], total_size: int) -> str:
    """The content of :data:`INDEX_FILE`.

    Args:
        files: the file of each tensor.
        total_size: of all tensors, in bytes.
    """
    index = {'metadata': {'total_size': total_size}, 'weight_map': dict(sorted(files.items()))}
    return json.dumps(index, indent=2) + '\n'


def shard_names(count: int) -> list[str]:
    """The names of the files of a checkpoint of ``count`` shards."""
    return [f'model-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)]


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those in its index, else the single file; empty if it has neither."""
    index = directory / INDEX_FILE
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())['weight_map'].values()))]
    single = directory / SINGLE_FILE
    return [single] if single.is_file() else []
