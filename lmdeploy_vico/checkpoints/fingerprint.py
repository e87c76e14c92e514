"""A fingerprint of a checkpoint's vision side: two that agree in it encode the same tile to the same tokens."""

import hashlib
from pathlib import Path

from lmdeploy_vico.checkpoints.files import NoWeightsError
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.safetensors_format import DamagedFileError, StoredTensor, read_header, shard_files
from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig

_CHUNK = 2**22  # bytes
_LENGTH = 16  # characters of a fingerprint: 64 bits, against mistakes, not against forgery


def vision_fingerprint(path: str | Path, config: VicoConfig) -> str:
    """Return a fingerprint of all tensors that are not the language model's, to the last bit, and of their model.

    What routes and cuts is left out: that is decided by the server. Every byte is read, since a router that was trained
    once more differs in nothing but values; for InternViT-6B that is 11 GB.

    Args:
        path: the checkpoint's directory.
        config: its config.

    Raises:
        UnsupportedCheckpointError: there are no weights, or a file cannot be read.
    """
    places: dict[str, tuple[Path, int, StoredTensor]] = {}
    files = shard_files(Path(path))
    if not files:
        raise NoWeightsError(f'{path} holds no weights that a fingerprint could be made of.')
    for file in files:
        try:
            with file.open('rb') as opened:
                tensors, _ = read_header(opened)
                begin = opened.tell()
        except (OSError, DamagedFileError) as error:
            raise UnsupportedCheckpointError(f'{file} cannot be read: {error}.') from error
        for name, tensor in tensors.items():
            if not name.startswith(LANGUAGE_MODEL):
                places[name] = file, begin + tensor.start, tensor
    digest = hashlib.sha256(repr((config.vision, config.llm_hidden_size)).encode())
    for name in sorted(places):
        file, start, tensor = places[name]
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        with file.open('rb') as opened:
            opened.seek(start)
            for left in range(tensor.nbytes, 0, -_CHUNK):
                digest.update(opened.read(min(left, _CHUNK)))
    return digest.hexdigest()[:_LENGTH]
