"""Synthetic quarters of tiles, from smooth to detailed, on which a random checkpoint is calibrated.

A quarter (224x224 pixels, 256 patches) has the statistics of a tile at a quarter of the cost.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy_vico.config import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD

SIDE = IMAGE_SIZE // 2


def synthetic_tiles(per_kind: int = 24) -> Tensor:
    """Return ``[n, 3, 224, 224]`` float64 pixels in 0..1: the same ones every time, whatever the checkpoint's seed."""
    generator = torch.Generator().manual_seed(2025)
    kinds = (_gradient, _blurred_noise, *[_photograph] * 4, _shapes, _strokes, _sharp_noise)
    tiles = [kind(generator, i / max(per_kind - 1, 1)) for kind in kinds for i in range(per_kind)]
    return (torch.stack(tiles) * 255).round().clamp(0, 255) / 255


def normalize(tiles: Tensor) -> Tensor:
    """Return the tiles with the channel statistics that InternViT expects."""
    mean, std = (tiles.new_tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (tiles - mean) / std


def detail(tiles: Tensor) -> Tensor:
    """Return the log of the mean absolute difference between neighbouring grey pixels of each tile, ``[n]``."""
    grey = tiles.mean(dim=1)
    steps = grey.diff(dim=1).abs().mean(dim=(1, 2)) + grey.diff(dim=2).abs().mean(dim=(1, 2))
    return (steps + 0.004).log()


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _grey(generator: torch.Generator, pixels: Tensor) -> Tensor:
    """Take the colour out of ``[1, 3, h, w]`` pixels, every other time on average."""
    return pixels[:, :1].expand_as(pixels) if float(_rand(generator, 1)) < 0.5 else pixels


def _gradient(generator: torch.Generator, level: float) -> Tensor:
    corners = _grey(generator, _rand(generator, 1, 3, 2, 2))
    tile = F.interpolate(corners, size=(SIDE, SIDE), mode='bilinear', align_corners=True)[0]
    return tile + 0.01 * level * torch.randn(tile.shape, generator=generator, dtype=tile.dtype)


def _blurred_noise(generator: torch.Generator, level: float) -> Tensor:
    cells = round(3 * 16**level)
    tile = F.interpolate(_rand(generator, 1, 3, cells, cells), size=(SIDE, SIDE), mode='bicubic')[0]
    grey = tile.mean(dim=0, keepdim=True)
    return (grey + 0.4 * (tile - grey)).clamp(0, 1)


def _photograph(generator: torch.Generator, level: float) -> Tensor:
    """Noise whose amplitude falls with frequency as in photographs, cut out of a sharp or of an enlarged one."""
    enlarged = 1 + 2 * float(_rand(generator, 1))
    side = round(SIDE / enlarged)
    white = torch.randn((3, side, side), generator=generator, dtype=torch.float64)
    white = 0.8 * white[:1] + 0.3 * white
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt().clamp(min=1 / side)
    tile = torch.fft.ifft2(torch.fft.fft2(white) * radius ** -(2.2 - 1.2 * level)).real
    contrast = 0.05 + 0.25 * _rand(generator, 1)
    ground = 0.1 + 0.8 * _rand(generator, 1, 1, 1) + 0.1 * _rand(generator, 3, 1, 1)
    return _enlarge((tile / tile.std() * contrast + ground).clamp(0, 1))


def _shapes(generator: torch.Generator, level: float) -> Tensor:
    tile = _rand(generator, 3, 1, 1).expand(3, SIDE, SIDE).clone()
    for _ in range(round(3 * 50**level)):
        y, x, h, w = (int(v) for v in _rand(generator, 4) * SIDE / math.sqrt(1 + 10 * level))
        y, x = (int(v) for v in _rand(generator, 2) * SIDE)
        tile[:, y : y + h + 4, x : x + w + 4] = _rand(generator, 3, 1, 1)
    return tile


def _strokes(generator: torch.Generator, level: float) -> Tensor:
    """Rows of short dark strokes on a light ground, like a page of text, enlarged where the level is low."""
    side = round(SIDE / (1 + 3 * (1 - level)))
    tile = torch.full((3, side, side), 0.95, dtype=torch.float64) - 0.5 * _rand(generator, 1, 1, 1)
    pitch = 8 + int(16 * float(_rand(generator, 1)))
    for top in range(4, side - pitch, pitch):
        for left in range(4, side - 8, 5):
            draw = _rand(generator, 4)
            if draw[0] < 0.7:
                y, h, w = top + int(draw[1] * pitch / 3), 2 + int(draw[2] * pitch / 2), 1 + int(draw[3] * 4)
                tile[:, y : y + h, left : left + w] *= 0.2
    return _enlarge(tile)


def _sharp_noise(generator: torch.Generator, level: float) -> Tensor:
    block = (7, 4, 2, 1)[int(4 * float(_rand(generator, 1)))]
    small = _rand(generator, 1, 3, SIDE // block, SIDE // block)
    contrast = 0.03 * 10**level
    ground = 0.2 + 0.6 * _rand(generator, 3, 1, 1)
    return (ground + contrast * (F.interpolate(small, size=(SIDE, SIDE), mode='nearest')[0] - 0.5)).clamp(0, 1)


def _enlarge(tile: Tensor) -> Tensor:
    """Resize as tiling resizes a photograph."""
    return F.interpolate(tile[None], size=(SIDE, SIDE), mode='bicubic')[0].clamp(0, 1)
