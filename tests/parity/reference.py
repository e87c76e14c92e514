"""The oracle of the parity tests: the whole model, plainly, in float32 on the CPU.

Written from the description of the model alone: no code or structure is shared with the package. Nothing is fused,
cached, absorbed or batched across prompts, and the language model runs over the whole sequence without a KV cache.

Both sides compute in float32 with the checkpoint's bfloat16 weights upcast. An engine that computes in bfloat16 differs
from this by its rounding alone, which is what :class:`Judgement` measures in standard deviations of the logits: a step
whose token is only the second best by 0.01 is a near tie, one that is 0.5 behind is a mistake.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from parity.prompts import Picture, Segment
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIDE = 448
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


# --- tiling ----------------------------------------------------------------------------------------------------------


def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the (columns, rows) whose aspect ratio is closest to the image's; for a tie see the last condition."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1)]
    grids = sorted((g for g in grids if min_tiles <= g[0] * g[1] <= max_tiles), key=lambda g: g[0] * g[1])
    best, best_distance = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        big_enough = width * height > 0.5 * SIDE * SIDE * columns * rows
        if distance < best_distance or (distance == best_distance and big_enough):
            best, best_distance = (columns, rows), distance
    return best


def cut_tiles(image: Image.Image, min_tiles: int, max_tiles: int, thumbnail: bool) -> np.ndarray:
    """Return ``uint8 [n, 448, 448, 3]``: the row-major tiles, then the thumbnail when there are several tiles."""
    columns, rows = choose_grid(*image.size, min_tiles, max_tiles)
    # Resized in the image's own mode, converted after: the order shows in palette and transparent images.
    whole = np.asarray(image.resize((SIDE * columns, SIDE * rows)).convert('RGB'))
    tiles = [whole[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] for r in range(rows) for c in range(columns)]
    if thumbnail and len(tiles) > 1:
        tiles.append(np.asarray(image.resize((SIDE, SIDE)).convert('RGB')))
    return np.stack(tiles)


# --- InternViT -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


class ViTAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config['hidden_size']
        self.heads = config['num_attention_heads']
        self.qkv = nn.Linear(width, 3 * width, bias=config['qkv_bias'])
        self.proj = nn.Linear(width, width)
        self.normalized = config['qk_normalization']
        if self.normalized:
            self.q_norm = RMSNorm(width, config['layer_norm_eps'])
            self.k_norm = RMSNorm(width, config['layer_norm_eps'])

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        q, k, v = self.qkv(x).split(width, dim=-1)
        if self.normalized:
            q, k = self.q_norm(q), self.k_norm(k)
        size = width // self.heads
        out = torch.empty_like(x)
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            attention = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)).softmax(dim=-1)
            out[..., part] = attention @ v[..., part]
        return self.proj(out)


class ViTBlock(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, eps = config['hidden_size'], config['layer_norm_eps']
        norm = RMSNorm if config['norm_type'] == 'rms_norm' else nn.LayerNorm
        self.norm1, self.norm2 = norm(width, eps=eps), norm(width, eps=eps)
        self.attn = ViTAttention(config)
        self.mlp = nn.ModuleDict(
            {
                'fc1': nn.Linear(width, config['intermediate_size']),
                'fc2': nn.Linear(config['intermediate_size'], width),
            }
        )
        self.ls1, self.ls2 = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x)))) * self.ls2


class ViT(nn.Module):
    """InternViT: tiles in, the last block's output without its class token out; there is no final norm."""

    def __init__(self, config: dict):
        super().__init__()
        width = config['hidden_size']
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.embeddings.position_embedding = nn.Parameter(torch.empty(1, 1025, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, kernel_size=14, stride=14)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(config) for _ in range(config['num_hidden_layers']))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.embeddings.patch_embedding(pixels)  # [n, D, 32, 32]
        patches = patches.reshape(*patches.shape[:2], 1024).permute(0, 2, 1)
        first = self.embeddings.class_embedding.repeat(len(pixels), 1, 1)
        x = torch.cat([first, patches], dim=1) + self.embeddings.position_embedding
        for block in self.encoder.layers:
            x = block(x)
        return x[:, 1:]


# --- router and projectors -------------------------------------------------------------------------------------------


class Pooling(nn.Module):
    """Four rounds of attention of one query over all patch tokens; rounds 2, 3 and 4 share the second's weights."""

    def __init__(self, width: int):
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        for i in range(1, 5):
            self.add_module(f'attn{i}', nn.MultiheadAttention(width, num_heads=16, batch_first=True))
            self.add_module(f'norm{i}', nn.LayerNorm(width, eps=1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        o = self.query_token.repeat(len(tokens), 1, 1)
        o = self.norm1(self.attn1(o, tokens, tokens)[0])
        for _ in range(3):
            o = self.norm2(self.attn2(o, tokens, tokens)[0])
        return o[:, 0]


class Gating(nn.Module):
    """Four residual blocks with the norm on the branch, then a linear layer with two classes."""

    def __init__(self, width: int):
        super().__init__()
        for i in range(1, 5):
            # The gaps in the numbering are the activation and the dropouts of the training code.
            block = nn.ModuleDict({'0': nn.Linear(width, 4 * width), '3': nn.Linear(4 * width, width)})
            block['5'] = nn.LayerNorm(width, eps=1e-5)
            self.add_module(f'block{i}', block)
        self.gate = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = x + block['5'](block['3'](F.gelu(block['0'](x))))
        return self.gate(x).softmax(dim=-1)


def shuffle(tokens: Tensor, ratio: int) -> Tensor:
    """Concatenate each ``ratio x ratio`` neighbourhood of the 32x32 grid ``[1024, D]``: ``[(32 / r)^2, r^2 D]``."""
    grid = tokens.reshape(32, 32, -1)
    rows = []
    for i in range(32 // ratio):
        for j in range(32 // ratio):
            rows.append(torch.cat([grid[ratio * i + y, ratio * j + x] for y in range(ratio) for x in range(ratio)]))
    return torch.stack(rows)


class Vision(nn.Module):
    """Everything before the language model, with the checkpoint's names."""

    def __init__(self, config: dict):
        super().__init__()
        width, hidden = config['vision_config']['hidden_size'], config['llm_config']['hidden_size']
        self.vision_model = ViT(config['vision_config'])
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        if config.get('flash_mode'):
            self.mlp2 = nn.Sequential(
                nn.LayerNorm(16 * width),
                nn.Linear(16 * width, 2 * hidden),
                nn.GELU(),
                nn.Dropout(),  # keeps the checkpoint's numbering; does nothing in eval mode
                nn.Linear(2 * hidden, 2 * hidden),
                nn.GELU(),
                nn.Dropout(),
                nn.Linear(2 * hidden, hidden),
            )
            self.pooling_before_gating = Pooling(width)
            self.gating = Gating(width)


def route(
    scores: Sequence[float],
    compression: str | float,
    relative: float,
    absolute: float,
    tiles: Sequence[np.ndarray] = (),
) -> list[bool]:
    """Tell for every tile of one prompt whether it is compressed to 64 tokens.

    Args:
        tiles: their pixels, for ``random:f``. For ``image:t`` the tiles are those of one image.
    """
    kind, _, value = str(compression).partition(':')
    if kind == 'image':
        return [bool(torch.tensor(scores).mean() >= float(value))] * len(scores)
    if kind == 'random':
        digests = [hashlib.sha256(tile.tobytes()).digest()[:16] for tile in tiles]
        drawn = [(hashlib.sha256(b'random' + digest).digest(), i) for i, digest in enumerate(digests)]
        count = math.floor(float(value) * len(scores) + 0.5)
        return [pair in sorted(drawn)[:count] for pair in drawn]
    if compression in ('none', 'all'):
        return [compression == 'all'] * len(scores)
    if compression == 'auto':
        s = torch.tensor(scores, dtype=torch.float32)
        return ((s > torch.quantile(s, relative)) & (s >= absolute)).tolist()
    count = math.floor(compression * len(scores) + 0.5)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """One image: ``embeddings [n, H]`` float32, the tokens of each tile (64 or 256) and its score p[0]."""

    embeddings: Tensor
    tile_tokens: list[int]
    scores: list[float]


@dataclass
class Judgement:
    """How far given tokens are from greedy ones, in standard deviations of each step's logits (0: the best token)."""

    gap: float
    prompt_tokens: int
    gaps: list[float] = field(repr=False)
    margins: list[float] = field(repr=False)  # best minus second best logit, in the same unit
    best: list[int] = field(repr=False)


class Reference:
    """A checkpoint, ready to encode images, to judge answers and to write its own. Works without ``flash_mode`` too."""

    def __init__(self, checkpoint_dir: str | Path, vision_dtype: torch.dtype = torch.float32):
        self.path = Path(checkpoint_dir)
        self.config = json.loads((self.path / 'config.json').read_text())
        self.flash = bool(self.config.get('flash_mode'))
        weights = _read(self.path)
        language = {k.removeprefix('language_model.'): v for k, v in weights.items() if k.startswith('language_model.')}
        vision = {k: v.float() for k, v in weights.items() if not k.startswith('language_model.')}
        self.vision = Vision(self.config).eval()
        self.vision.load_state_dict(vision, strict=True)
        self.vision.to(vision_dtype)  # to see what rounding to another type does to the same arithmetic
        self.vision_dtype = vision_dtype
        self.language = _load_language(self.config['llm_config'], language)
        self.tokenizer = Tokenizer.from_file(str(self.path / 'tokenizer.json'))
        self.image_token = self.tokenizer.token_to_id('<IMG_CONTEXT>')

    def tile(self, image: Image.Image, max_tiles: int | None = None) -> np.ndarray:
        """Return the image's tiles, ``uint8 [n, 448, 448, 3]``."""
        low, high = self.config['min_dynamic_patch'], self.config['max_dynamic_patch']
        return cut_tiles(image, low, high if max_tiles is None else max_tiles, self.config['use_thumbnail'])

    @torch.no_grad()
    def features(self, tiles: np.ndarray) -> Tensor:
        """Return the patch tokens of ``uint8`` tiles, ``[n, 1024, D]``, computed one tile at a time."""
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return torch.cat([self.vision.vision_model(p[None]) for p in pixels.to(self.vision_dtype)])

    @torch.no_grad()
    def scores(self, features: Tensor) -> list[float]:
        """Return each tile's probability of being compressed; 0 for a checkpoint without a router.

        One tile at a time: some processors' products of several rows differ in the last bits between equal rows, and
        tiles that score the same are not compressed.
        """
        if not self.flash:
            return [0.0] * len(features)
        gating, pooling = self.vision.gating, self.vision.pooling_before_gating
        return [gating(pooling(tile[None]))[0, 0].item() for tile in features]

    @torch.no_grad()
    def project(self, tokens: Tensor, compressed: bool) -> Tensor:
        """Return one tile's visual tokens, ``[64 or 256, H]``."""
        return self.vision.mlp2(shuffle(tokens, 4)) if compressed else self.vision.mlp1(shuffle(tokens, 2))

    def encode(
        self,
        images: Sequence[Image.Image],
        compression: str | float = 'auto',
        per_image: Sequence[str | float | None] | None = None,
        max_tiles: Sequence[int | None] | None = None,
        videos: Sequence[int | None] | None = None,
    ) -> list[Encoded]:
        """Encode the images of one prompt.

        An image with its own entry in ``per_image`` is routed by itself, or with the other images of the same number in
        ``videos``; all the others together.
        """
        own = list(per_image or [None] * len(images))
        limits = max_tiles or [None] * len(images)
        pixels = [self.tile(image, limit) for image, limit in zip(images, limits, strict=True)]
        features = [self.features(tiles) for tiles in pixels]
        scores = [self.scores(x) for x in features]
        members: dict[object, list[int]] = {}
        for i, (value, video) in enumerate(zip(own, videos or [None] * len(images), strict=True)):
            key = 'the rest' if value is None else ('image', i) if video is None else ('video', video)
            members.setdefault(key, []).append(i)
        routes: list[list[bool]] = [[]] * len(images)
        for indices in members.values():
            wanted = compression if own[indices[0]] is None else own[indices[0]]
            for together in [[i] for i in indices] if str(wanted).startswith('image:') else [indices]:
                tiles = [tile for i in together for tile in pixels[i]]
                routed = iter(self._route([s for i in together for s in scores[i]], wanted, tiles))
                for i in together:
                    routes[i] = [next(routed) for _ in scores[i]]
        return [
            Encoded(
                torch.cat([self.project(t, c) for t, c in zip(tiles, compressed, strict=True)]),
                [64 if c else 256 for c in compressed],
                s,
            )
            for tiles, compressed, s in zip(features, routes, scores, strict=True)
        ]

    def _route(self, scores: list[float], compression: str | float, tiles: Sequence[np.ndarray]) -> list[bool]:
        if not scores:
            return []
        if not self.flash:
            return [False] * len(scores)
        relative, absolute = self.config['flash_relative_threshold'], self.config['flash_absolute_threshold']
        return route(scores, compression, relative, absolute, tiles)

    @torch.no_grad()
    def prompt(self, segments: Sequence[Segment], compression: str | float = 'auto') -> tuple[list[int], Tensor]:
        """Return the input ids of a prompt, images expanded, and its embeddings ``[length, H]``.

        An ``<IMG_CONTEXT>`` that stands in a text is a word like any other: it gets that token's text embedding.
        """
        segments = [Picture(s) if isinstance(s, Image.Image) else s for s in segments]
        pictures = [s for s in segments if isinstance(s, Picture)]
        encoded = iter(
            self.encode(
                [p.image for p in pictures],
                compression,
                [p.compression for p in pictures],
                [p.max_tiles for p in pictures],
                [p.video for p in pictures],
            )
        )
        pieces: list[str | Tensor] = []
        for segment in segments:
            if isinstance(segment, str):
                pieces.append(segment)
            else:
                visual = next(encoded).embeddings
                pieces += ['<img>', visual, '</img>'] if segment.wrapped else [visual]
        ids: list[int] = []
        embeddings = [torch.empty(0, self.config['llm_config']['hidden_size'])]
        for piece in _merge_text(pieces):
            if isinstance(piece, str):
                words = self.tokenizer.encode(piece, add_special_tokens=False).ids
                ids += words
                embeddings.append(self._embed(words))
            else:
                ids += [self.image_token] * len(piece)
                embeddings.append(piece)
        return ids, torch.cat(embeddings)

    def prompt_ids(self, segments: Sequence[Segment], compression: str | float = 'auto') -> list[int]:
        """Return the input ids of a prompt: one ``<IMG_CONTEXT>`` per visual token."""
        return self.prompt(segments, compression)[0]

    @torch.no_grad()
    def logits(self, embeddings: Tensor, last: int) -> Tensor:
        """Return the logits of the ``last`` positions, ``[last, vocabulary]``."""
        out = self.language(inputs_embeds=embeddings[None], use_cache=False, logits_to_keep=last)
        return out.logits[0].float()

    def judge(
        self, segments: Sequence[Segment], output_ids: Sequence[int], compression: str | float = 'auto'
    ) -> Judgement:
        """Compare an answer with the logits that this model gives for the prompt and the answer's own beginning."""
        ids, embeddings = self.prompt(segments, compression)
        logits = self.logits(torch.cat([embeddings, self._embed(output_ids[:-1])]), len(output_ids))
        given = logits[torch.arange(len(output_ids)), torch.tensor(output_ids)]
        top, best = logits.topk(2, dim=-1)
        std = logits.std(dim=-1)
        gaps = ((top[:, 0] - given) / std).tolist()
        margins = ((top[:, 0] - top[:, 1]) / std).tolist()
        return Judgement(max(gaps), len(ids), gaps, margins, best[:, 0].tolist())

    def generate(self, segments: Sequence[Segment], n: int, compression: str | float = 'auto') -> list[int]:
        """Return ``n`` greedy tokens, the whole sequence computed anew for each."""
        embeddings = self.prompt(segments, compression)[1]
        output: list[int] = []
        for _ in range(n):
            output.append(int(self.logits(torch.cat([embeddings, self._embed(output)]), 1).argmax()))
        return output

    @torch.no_grad()
    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.language.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long))


def _merge_text(pieces: Sequence[str | Tensor]) -> list[str | Tensor]:
    merged: list[str | Tensor] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _read(path: Path) -> dict[str, Tensor]:
    weights = {}
    for file in sorted(path.glob('*.safetensors')):
        with safe_open(file, framework='pt') as tensors:
            weights.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return weights


def _load_language(config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """Load a Qwen3 model through ``from_pretrained``, which knows how this version of transformers stores experts."""
    moe = config['architectures'] == ['Qwen3MoeForCausalLM']
    config_class, model_class = (Qwen3MoeConfig, Qwen3MoeForCausalLM) if moe else (Qwen3Config, Qwen3ForCausalLM)
    with tempfile.TemporaryDirectory() as directory:
        config_class(**config).save_pretrained(directory)
        save_file(weights, f'{directory}/model.safetensors', metadata={'format': 'pt'})
        model, loading = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {k: v for k, v in loading.items() if v}
    if wrong:
        raise ValueError(f'the language model was not loaded completely: {wrong}')
    return model.eval()
