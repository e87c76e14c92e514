"""Synthetic 448x448 tiles, from smooth to detailed, on which a random checkpoint is calibrated."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy_vico.testing.configuration import TILE

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def synthetic_tiles(per_kind: int = 10) -> Tensor:
    """Return ``[n, 3, 448, 448]`` float64 tiles in 0..1: the same ones every time, whatever the checkpoint's seed."""
    generator = torch.Generator().manual_seed(2025)
    kinds = (_gradient, _blurred_noise, _photograph, _photograph, _shapes, _strokes, _sharp_noise)
    tiles = [kind(generator, i / max(per_kind - 1, 1)) for kind in kinds for i in range(per_kind)]
    return (torch.stack(tiles) * 255).round().clamp(0, 255) / 255


def normalize(tiles: Tensor) -> Tensor:
    """Return the tiles with the channel statistics that InternViT expects."""
    mean, std = (tiles.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (tiles - mean) / std


def detail(tiles: Tensor) -> Tensor:
    """Return the log of the mean absolute difference between neighbouring grey pixels of each tile, ``[n]``."""
    grey = tiles.mean(dim=1)
    steps = grey.diff(dim=1).abs().mean(dim=(1, 2)) + grey.diff(dim=2).abs().mean(dim=(1, 2))
    return (steps + 0.004).log()


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _gradient(generator: torch.Generator, level: float) -> Tensor:
    corners = _rand(generator, 1, 3, 2, 2)
    tile = F.interpolate(corners, size=(TILE, TILE), mode='bilinear', align_corners=True)[0]
    return tile + 0.01 * level * torch.randn(tile.shape, generator=generator, dtype=tile.dtype)


def _blurred_noise(generator: torch.Generator, level: float) -> Tensor:
    cells = round(3 * 16**level)
    tile = F.interpolate(_rand(generator, 1, 3, cells, cells), size=(TILE, TILE), mode='bicubic')[0]
    grey = tile.mean(dim=0, keepdim=True)
    return (grey + 0.4 * (tile - grey)).clamp(0, 1)


def _photograph(generator: torch.Generator, level: float) -> Tensor:
    """Noise whose amplitude falls with frequency as it does in photographs, steeper ones being smoother."""
    white = torch.randn((3, TILE, TILE), generator=generator, dtype=torch.float64)
    white = 0.8 * white[:1] + 0.3 * white
    f = torch.fft.fftfreq(TILE, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt().clamp(min=1 / TILE)
    tile = torch.fft.ifft2(torch.fft.fft2(white) * radius ** -(2.4 - 1.5 * level)).real
    contrast = 0.08 + 0.2 * _rand(generator, 1)
    return (tile / tile.std() * contrast + 0.2 + 0.6 * _rand(generator, 3, 1, 1)).clamp(0, 1)


def _shapes(generator: torch.Generator, level: float) -> Tensor:
    tile = _rand(generator, 3, 1, 1).expand(3, TILE, TILE).clone()
    for _ in range(round(3 * 50**level)):
        y, x, h, w = (int(v) for v in _rand(generator, 4) * TILE * 0.5 / math.sqrt(1 + 10 * level))
        y, x = (int(v) for v in _rand(generator, 2) * TILE)
        tile[:, y : y + h + 4, x : x + w + 4] = _rand(generator, 3, 1, 1)
    return tile


def _strokes(generator: torch.Generator, level: float) -> Tensor:
    """Rows of short dark strokes on a light ground, like a page of text."""
    tile = torch.full((3, TILE, TILE), 0.95, dtype=torch.float64) - 0.2 * _rand(generator, 3, 1, 1)
    pitch = round(40 - 26 * level)
    for top in range(4, TILE - pitch, pitch):
        for left in range(4, TILE - 8, 5):
            draw = _rand(generator, 4)
            if draw[0] < 0.8:
                y, h, w = top + int(draw[1] * pitch / 3), 2 + int(draw[2] * pitch / 2), 1 + int(draw[3] * 4)
                tile[:, y : y + h, left : left + w] = 0.1
    return tile


def _sharp_noise(generator: torch.Generator, level: float) -> Tensor:
    block = (7, 4, 2, 1)[int(level * 3.999)]
    small = _rand(generator, 1, 3, TILE // block, TILE // block)
    contrast = 0.2 + 0.8 * float(_rand(generator, 1))
    return 0.5 + contrast * (F.interpolate(small, size=(TILE, TILE), mode='nearest')[0] - 0.5)
