"""The dimensions of models: those that are published, and what a checkpoint of any other size is described by.

Nothing here loads torch, so that what only counts can use it.
"""

from dataclasses import dataclass

VOCABULARY = 151936  # embedding rows of the published language models


@dataclass(frozen=True)
class Size:
    """The dimensions of a model. ``vit_width`` is a multiple of 16, the number of the router's heads."""

    vit_width: int
    vit_layers: int
    vit_heads: int
    vit_mlp: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    experts: int
    experts_per_token: int
    expert_mlp: int


@dataclass(frozen=True)
class Model:
    """A model's dimensions: ``llm`` is 'dense' (Qwen3) or 'moe' (Qwen3-MoE), ``vit`` the norm of its InternViT."""

    size: Size
    llm: str = 'dense'
    vit: str = 'layer_norm'
    vocab_size: int = VOCABULARY


INTERNVIT_300M = (1024, 24, 16, 4096)
INTERNVIT_6B = (3200, 45, 25, 12800)


def _dense(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 8, 128, mlp, experts=0, experts_per_token=0, expert_mlp=0)
    return Model(size, 'dense', _vit_norm(vit))


def _moe(vit: tuple[int, int, int, int], hidden: int, layers: int, heads: int, mlp: int, expert_mlp: int) -> Model:
    size = Size(*vit, hidden, layers, heads, 4, 128, mlp, experts=128, experts_per_token=8, expert_mlp=expert_mlp)
    return Model(size, 'moe', _vit_norm(vit))


def _vit_norm(vit: tuple[int, int, int, int]) -> str:
    return 'rms_norm' if vit is INTERNVIT_6B else 'layer_norm'


# No language model has tied embeddings: the 1B is published with 1.06 billion parameters, 0.16 of them its head.
MODELS = {
    '1B': _dense(INTERNVIT_300M, 1024, 28, 16, 3072),
    '2B': _dense(INTERNVIT_300M, 2048, 28, 16, 6144),
    '4B': _dense(INTERNVIT_300M, 2560, 36, 32, 9728),
    '8B': _dense(INTERNVIT_300M, 4096, 36, 32, 12288),
    '14B': _dense(INTERNVIT_300M, 5120, 40, 40, 17408),
    '30B-A3B': _moe(INTERNVIT_300M, 2048, 48, 32, 6144, expert_mlp=768),
    '38B': _dense(INTERNVIT_6B, 5120, 64, 64, 25600),
    '241B': _moe(INTERNVIT_6B, 4096, 94, 64, 12288, expert_mlp=1536),
}
