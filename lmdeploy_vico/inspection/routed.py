"""Routes pictures without a server: which tiles, which scores, which of them get 64 visual tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from lmdeploy_vico.choices import Compression
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.routing import as_json
from lmdeploy_vico.vision.tiling import Grid, Tiling


@dataclass(frozen=True)
class Routed:
    """What became of a picture.

    Attributes:
        name: of the picture.
        image: RGB, upright.
        grid: of its tiles.
        scores: the router's score of each tile, row by row, the thumbnail's last: the probability that compressing the
            tile loses nothing (paper, Eq. 4).
        tokens: visual tokens of each tile, 64 or 256.
    """

    name: str
    image: Image.Image
    grid: Grid
    scores: Sequence[float]
    tokens: Sequence[int]

    @property
    def full(self) -> int:
        """The visual tokens that it would have without compression."""
        return TOKENS_FULL * len(self.tokens)

    @property
    def compressed(self) -> list[bool]:
        """Which tiles get 64 tokens."""
        return [count == TOKENS_COMPRESSED for count in self.tokens]

    def as_json(self) -> dict[str, object]:
        """Path, grid, tiles and tokens."""
        return {'path': self.name, **as_json(self.grid, self.scores, self.tokens)}


def device_of(name: str | None) -> torch.device | None:
    """The device that a command line names; None for the encoder's default.

    Raises:
        InspectionError: there is no such device.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InspectionError(f'--device must be cpu, cuda or cuda:1 (and so on), not {name!r}.') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise InspectionError(f'--device {name}: torch sees {torch.cuda.device_count()} CUDA devices.')
    return device


def route_pictures(
    encoder: VisionEncoder,
    pictures: Iterable[tuple[str, Image.Image]],
    compression: Compression,
    together: bool,
    done: Callable[[], object] = lambda: None,
) -> list[Routed]:
    """Route pictures.

    Args:
        encoder: of the checkpoint.
        pictures: each with its name.
        compression: as in a request.
        together: whether they are the pictures of one prompt, whose tiles are compared with each other; otherwise each
            is a prompt by itself.
        done: called after each prompt.
    """
    prompts = [list(pictures)] if together else ([picture] for picture in pictures)
    tiling = Tiling.of(encoder.config)
    routed = []
    for prompt in prompts:
        results = encoder.encode([image for _, image in prompt], compression)
        for (name, image), result in zip(prompt, results, strict=True):
            routed.append(Routed(name, image, tiling.grid(image.size), result.scores, result.tile_tokens))
        done()
    return routed
