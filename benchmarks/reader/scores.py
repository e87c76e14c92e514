"""The router's scores of a data set's pictures, computed here: a server does not tell them."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.evaluation.data import DataSet
from lmdeploy_vico.training.model.build import fill, outline_router
from lmdeploy_vico.training.stages.initialise import read_config
from lmdeploy_vico.vision.routing import route
from lmdeploy_vico.vision.tiling import Tiling, cut_grid


@dataclass(frozen=True)
class Calibration:
    """What a data set says about the rule that compresses whole images.

    Attributes:
        threshold: the mean score from which images are compressed.
        share: of the tiles, which it compresses.
        wanted: of the tiles, which the router's own rule compresses.
        pictures: there are.
    """

    threshold: float
    share: float
    wanted: float
    pictures: int


@torch.no_grad()
def calibrate(checkpoint: Path, data: DataSet) -> Calibration:
    """Find the mean score from which images are compressed whole so that as many tiles are as by the router's rule.

    Args:
        checkpoint: whose router scores.
        data: questions about one picture each; a picture counts as often as it is asked about.
    """
    config = read_config(checkpoint)
    vico = VicoConfig.from_dict(config)
    router = fill(outline_router(config), [checkpoint], torch.device('cpu'))
    tiling = Tiling.of(vico)
    found: dict[str, tuple[float, int, int]] = {}  # mean score, tiles, tiles that the router compresses
    for question in data.questions:
        if question.group not in found:
            [picture] = question.pictures
            image = Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB')
            tiles = torch.from_numpy(cut_grid(image, tiling.grid(image.size)))
            scores = router(tiles).softmax(-1)[:, 0]
            chosen = route(scores, 'auto', vico.relative_threshold, vico.absolute_threshold)
            found[question.group] = scores.mean().item(), len(scores), int(chosen.sum())
    ordered = sorted((found[question.group] for question in data.questions), reverse=True)
    means, counts, chosen_counts = (np.array(values) for values in zip(*ordered, strict=True))
    wanted = float(chosen_counts.sum() / counts.sum())
    # Between two different means: questions about one picture fall on the same side.
    ends = np.flatnonzero(np.diff(means, append=-np.inf))
    shares = counts.cumsum()[ends] / counts.sum()
    best = int(np.argmin(np.abs(shares - wanted)))
    following = means[ends[best] + 1] if ends[best] + 1 < len(means) else 0.0
    return Calibration(float(means[ends[best]] + following) / 2, float(shares[best]), wanted, len(found))
