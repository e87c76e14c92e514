"""What a stage is given for each image of a prompt, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lmdeploy_vico.choices import Compression
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import RoutingGroup
from lmdeploy_vico.vision.tiling import Grid


@dataclass(frozen=True)
class ImageJob:
    """One image of a prompt, and how it is to be cut and routed.

    Attributes:
        image: the picture as its client sent it; Pillow may not have read its pixels yet.
        grid: the tiles that it is cut into.
        compression: the image's own; None to route it by the prompt's, together with the prompt's other such images.
        routed_with: jobs with the same number and a compression of their own are routed together: a video's frames.
        salt: tiles are shared, now and later, among images of the same salt only.
    """

    image: Image.Image
    grid: Grid
    compression: Compression | None = None
    routed_with: int | None = None
    salt: str = ''

    @property
    def tiles(self) -> int:
        """The number of its tiles, a thumbnail included."""
        return self.grid.tiles


@dataclass(frozen=True)
class EncodedImage:
    """An image's visual tokens, on the CPU, and of each of its tiles a digest of its content and the image's salt."""

    tokens: VisualTokens
    digests: Sequence[bytes]


def routing_groups(jobs: Sequence[ImageJob], compression: Compression) -> list[RoutingGroup]:
    """Return which images of a prompt are routed together, and by which compression.

    Images without a compression of their own form one group, with the prompt's ``compression``. The frames of a video
    that has its own form another. Any other image that has its own is routed alone.
    """
    groups: dict[object, tuple[list[int], Compression]] = {}
    for index, job in enumerate(jobs):
        if job.compression is None:
            groups.setdefault('prompt', ([], compression))[0].append(index)
        else:
            key = ('image', index) if job.routed_with is None else ('together', job.routed_with)
            groups.setdefault(key, ([], job.compression))[0].append(index)
    return list(groups.values())
