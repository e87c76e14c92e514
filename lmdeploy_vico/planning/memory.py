"""The memory of each GPU of a server: what does not fit, and what is left for KV cache."""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.rank_memory import CUDA_CONTEXT, RANK_OVERHEAD, CacheSizing, rank_bytes
from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.planning import constants
from lmdeploy_vico.planning.gpus import GPUS, Gpu
from lmdeploy_vico.planning.language import BYTES, shapes_of


@dataclass(frozen=True)
class Split:
    """LMDeploy's split over the GPUs of a server: everything over all of them."""

    attn_tp: int
    ep: int = 1

    @property
    def mlp_tp(self) -> int:
        """Ranks that share a dense MLP."""
        return self.attn_tp

    @property
    def moe_tp(self) -> int:
        """Ranks that share each expert."""
        return self.attn_tp


@dataclass(frozen=True)
class Memory:
    """What is on each GPU of a server.

    Attributes:
        model, gpu, tp: of the server.
        shared: whether the vision side is on it, too.
        max_prefill_tokens: of a step.
    """

    model: str
    gpu: Gpu
    tp: int
    shared: bool
    max_prefill_tokens: int

    @property
    def cache(self) -> CacheSizing:
        """The numbers from which LMDeploy computes the KV cache."""
        size = MODELS[self.model].size
        return CacheSizing(
            weights=language_bytes(self.model, self.tp),
            vocab_size=MODELS[self.model].vocab_size,
            max_batches=constants.MAX_BATCH,
            max_prefill_tokens=self.max_prefill_tokens,
            share=constants.KV_SHARE,
            block=2 * BYTES * size.layers * max(size.kv_heads // self.tp, 1) * size.head_dim * constants.BLOCK_TOKENS,
        )

    @property
    def free_bytes(self) -> int:
        """Bytes that are free before the language model is loaded."""
        vision = vision_bytes(self.model) + CUDA_CONTEXT + constants.VISION_WORKING
        return self.gpu.memory - (vision if self.shared else 0)

    @property
    def spare_bytes(self) -> int:
        """Bytes that are left before LMDeploy takes its share for KV cache; negative where that many are missing."""
        cache = self.cache
        logits = (cache.max_prefill_tokens + 2 * cache.max_batches) * cache.vocab_size * BYTES
        return self.free_bytes - cache.weights - RANK_OVERHEAD - logits

    @property
    def kv_blocks(self) -> int:
        """KV blocks, as many on each GPU."""
        return self.cache.kv_bytes(self.free_bytes) // self.cache.block if self.spare_bytes > 0 else 0

    def larger(self, blocks: int = 1) -> str:
        """Say what would hold so many KV blocks, each by itself."""
        tp = next((tp for tp in working_tp(self.model) if replace(self, tp=tp).kv_blocks >= blocks), None)
        gpus = [name for name, gpu in GPUS.items() if replace(self, gpu=gpu).kv_blocks >= blocks]
        hints = [f'--tp {tp}'] if tp else []
        hints += [f'--gpu {" or ".join(gpus)}'] if gpus else []
        hints += ['--vision-devices 1'] if self.shared and replace(self, shared=False).kv_blocks >= blocks else []
        return (
            f'It would fit with {", or with ".join(hints)}.' if hints else 'Nothing that is known here would hold it.'
        )


@cache
def language_bytes(model: str, tp: int) -> int:
    """Return the bytes of a language model's weights on each of ``tp`` GPUs."""
    sizes = {name: BYTES * prod(shape) for name, shape in shapes_of(model).items() if name.startswith(LANGUAGE_MODEL)}
    return rank_bytes(sizes, Split(tp), MODELS[model].size.kv_heads)


@cache
def vision_bytes(model: str) -> int:
    """Return the bytes of the weights of ViT, router and projectors."""
    return BYTES * sum(prod(shape) for name, shape in shapes_of(model).items() if not name.startswith(LANGUAGE_MODEL))


def working_tp(model: str) -> list[int]:
    """Return over how many GPUs LMDeploy can split a model.

    Query heads are dealt evenly, and so are key-value heads; where there are too few, several GPUs have the same.
    """
    size = MODELS[model].size
    return [
        tp
        for tp in range(1, size.heads + 1)
        if size.heads % tp == 0 and (size.kv_heads % tp == 0 or tp % size.kv_heads == 0)
    ]
