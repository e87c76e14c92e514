"""What one rank of a tensor-parallel language model holds, as a model of its own that a single GPU can serve."""

from dataclasses import replace

from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.checkpoints.sizes import MODELS, Model

TINY = 'tiny'  # a mixture of experts of a few megabytes, to try the commands
TINY_VOCABULARY = 4096


def whole(like: str) -> Model:
    """Return the model that is split: a published one, or the tiny one; raises KeyError for another name."""
    return Model(SIZES[TINY], 'moe', vocab_size=TINY_VOCABULARY) if like == TINY else MODELS[like]


def rank_share(model: Model, tp: int, layers: int | None = None) -> Model:
    """Return the dimensions of what one of ``tp`` ranks computes.

    As LMDeploy splits its Qwen3 models: query heads, and the columns of an MLP or of every expert, are dealt evenly.
    Where there are fewer key-value heads than ranks, several ranks have the same one. Every rank has the embeddings,
    the head, the norms and the experts' gates as a whole. The vision side is no part of it: a tiny one takes its place.

    Args:
        model: the whole model.
        tp: ranks.
        layers: of the share; None for all.

    Raises:
        ValueError: the model cannot be split that way, or has fewer layers.
    """
    size, tiny = model.size, SIZES[TINY]
    dealt = {'heads': size.heads, 'mlp': size.mlp, 'expert_mlp': size.expert_mlp}
    uneven = {name: count for name, count in dealt.items() if count % tp}
    if uneven or (size.kv_heads % tp and tp % size.kv_heads):
        raise ValueError(f'{tp} ranks cannot share {size.kv_heads} key-value heads and {dealt}')
    if layers is not None and not 0 < layers <= size.layers:
        raise ValueError(f'a share has 1 to {size.layers} layers, not {layers}')
    share = replace(
        size,
        vit_width=tiny.vit_width,
        vit_layers=tiny.vit_layers,
        vit_heads=tiny.vit_heads,
        vit_mlp=tiny.vit_mlp,
        layers=layers or size.layers,
        kv_heads=max(1, size.kv_heads // tp),
        **{name: count // tp for name, count in dealt.items()},
    )
    return replace(model, size=share, vit='layer_norm')
