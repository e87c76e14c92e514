"""What pressure has done to a prompt: how many tiles are compressed that would be full without it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lmdeploy_vico.adapter.server.request import VicoRequest
from lmdeploy_vico.choices import Compression, Pressed
from lmdeploy_vico.config import TOKENS_COMPRESSED
from lmdeploy_vico.stage.jobs import EncodedImage, routing_groups
from lmdeploy_vico.vision.routing import route_prompt


def pressed_tiles(request: VicoRequest, images: Sequence[EncodedImage], thresholds: tuple[float, float]) -> int:
    """Count the tiles of a prompt that are compressed because the language model is overloaded.

    Args:
        request: decoded.
        images: its images and frames, encoded.
        thresholds: of the routing rule, relative and absolute.
    """
    named = [request.compression, *(job.compression for job in request.pictures)]
    if not any(isinstance(compression, Pressed) for compression in named):
        return 0
    compressed = sum(tokens == TOKENS_COMPRESSED for image in images for tokens in image.tokens.tile_tokens)
    if request.synthetic:
        return compressed - sum(image.compressed for image in request.synthetic)
    jobs = [
        job if job.compression is None else replace(job, compression=_without(job.compression))
        for job in request.pictures
    ]
    calm = route_prompt(
        torch.tensor([score for image in images for score in image.tokens.scores]),
        [digest for image in images for digest in image.digests],
        [len(image.digests) for image in images],
        routing_groups(jobs, _without(request.compression)),
        *thresholds,
    )
    return compressed - int(calm.sum())


def _without(compression: Compression) -> Compression:
    return compression.base if isinstance(compression, Pressed) else compression
