"""The router's scores of a data set's pictures, computed here: a server does not tell them."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.evaluation.data import DataSet
from lmdeploy_vico.training.model.build import fill, outline_router
from lmdeploy_vico.training.stages.initialise import read_config
from lmdeploy_vico.vision.tiling import Tiling, cut_grid


@torch.no_grad()
def image_threshold(checkpoint: Path, data: DataSet, wanted: float) -> float:
    """The mean score from which images are compressed whole so that about a share of all tiles is.

    Args:
        checkpoint: whose router scores.
        data: pictures; each counts as often as it is asked about.
        wanted: the share.
    """
    config = read_config(checkpoint)
    router = fill(outline_router(config), [checkpoint], torch.device('cpu'))
    tiling = Tiling.of(VicoConfig.from_dict(config))
    means: dict[str, tuple[float, int]] = {}
    for question in data.questions:
        [picture] = question.pictures
        if question.group not in means:
            image = Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB')
            tiles = torch.from_numpy(cut_grid(image, tiling.grid(image.size)))
            scores = router(tiles).softmax(-1)[:, 0]
            means[question.group] = scores.mean().item(), len(scores)
    ordered = sorted((means[question.group] for question in data.questions), reverse=True)
    counts = np.cumsum([count for _, count in ordered]) / sum(count for _, count in ordered)
    last = int(np.argmin(np.abs(counts - wanted)))
    following = ordered[last + 1][0] if last + 1 < len(ordered) else 0.0
    return (ordered[last][0] + following) / 2
