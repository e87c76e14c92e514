"""What an encoder says of itself, and whether a server may use it."""

import platform
import uuid
from dataclasses import asdict, dataclass

import torch

from lmdeploy_vico import __version__
from lmdeploy_vico.choices import Speedups
from lmdeploy_vico.stage.remote.channel import Hello
from lmdeploy_vico.vision.tile_encoder import TileEncoder

# What bits depend on, and how a message names it.
BITS = {
    'dtype': 'data type',
    'tile_batch': 'tile batch',
    'device': 'device',
    'kernels': 'kernels',
    'speedups': 'ViT speed-ups',
    'torch': 'torch',
    'threads': 'threads',
}


@dataclass(frozen=True)
class Identity:
    """One start of one encoder.

    Attributes:
        version: of the plugin.
        checkpoint: its fingerprint.
        path: of the checkpoint, on the encoder's machine.
        host: the encoder's machine.
        dtype, tile_batch: of the encoder.
        device: its kind: a GPU's name, or "cpu" and the processor's architecture.
        kernels: their implementation.
        speedups: those of the ViT that are on.
        torch: its version.
        threads: of torch on a CPU, where sums depend on their number; 0 on a GPU.
        incarnation: another one after each start.
    """

    version: str
    checkpoint: str
    path: str
    host: str
    dtype: str
    tile_batch: int
    device: str
    kernels: str
    speedups: str
    torch: str
    threads: int
    incarnation: str

    @classmethod
    def of(cls, encoder: TileEncoder, fingerprint: str, path: str, speedups: Speedups) -> 'Identity':
        """That of an encoder which has just been loaded in this process."""
        device, on_cpu = encoder.device, encoder.device.type == 'cpu'
        return cls(
            version=__version__,
            checkpoint=fingerprint,
            path=path,
            host=platform.node(),
            dtype=str(encoder.dtype).removeprefix('torch.'),
            tile_batch=encoder.tile_batch,
            device=f'cpu ({platform.machine()})' if on_cpu else torch.cuda.get_device_name(device),
            kernels=encoder.kernels,
            speedups=str(speedups),
            torch=torch.__version__,
            threads=torch.get_num_threads() if on_cpu else 0,
            incarnation=uuid.uuid4().hex,
        )

    def hello(self) -> Hello:
        """It as a plain mapping."""
        return asdict(self)


def difference(name: str, hello: Hello, fingerprint: str, example: Hello | None) -> str | None:
    """Say in a sentence why a server does not use an encoder; None if it does.

    Args:
        name: of the encoder.
        hello: what it says of itself.
        fingerprint: of the server's checkpoint.
        example: what an encoder that the server uses says of itself. A tile's tokens must not depend on who encodes it,
            so all have to agree in what bits depend on.
    """
    where = f'The encoder {name} on {hello.get("host")}'
    if hello.get('version') != __version__:
        return (
            f'{where} runs lmdeploy-vico {hello.get("version")}, this server {__version__}: install one version on all '
            'machines.'
        )
    if hello.get('checkpoint') != fingerprint:
        return (
            f'{where} serves another checkpoint, {hello.get("path")} (fingerprint {hello.get("checkpoint")}, this '
            f"server's is {fingerprint}): start encoders of this server's checkpoint."
        )
    for key, words in BITS.items() if example is not None else ():
        assert example is not None
        if hello.get(key) != example.get(key):
            return (
                f'{where} differs in its {words}, {hello.get(key)}, from the others, {example.get(key)}: it would '
                'encode tiles to other bits. Start all encoders of a checkpoint alike, on devices of one kind.'
            )
    return None
