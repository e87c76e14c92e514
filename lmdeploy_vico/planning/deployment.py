"""What is served on what, what a request is, and whether that can be."""

from dataclasses import dataclass
from math import ceil

from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.planning import PlanningError, constants
from lmdeploy_vico.planning.gpus import Gpu
from lmdeploy_vico.planning.language import LanguageModel
from lmdeploy_vico.planning.memory import Memory, working_tp

MOST = 1 - TOKENS_COMPRESSED / TOKENS_FULL  # the share of visual tokens that is removed where all tiles are compressed


@dataclass(frozen=True)
class Workload:
    """What every request is.

    Attributes:
        tiles: of its picture, thumbnail included.
        text_tokens: of its own text.
        compression: the share of its visual tokens that is removed, 0 to 0.75.
        images: whether a picture is prepared and encoded; otherwise the visual tokens are there, as in the paper.
    """

    tiles: int
    text_tokens: int
    compression: float
    images: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.compression <= MOST:
            raise PlanningError(
                f'--compression takes shares of the visual tokens to remove, from 0 to {MOST} (all tiles compressed), '
                f'not {self.compression:g}.'
            )

    @property
    def visual_tokens(self) -> float:
        """Visual tokens of a prompt."""
        return self.tiles * TOKENS_FULL * (1 - self.compression)

    @property
    def tokens(self) -> float:
        """Tokens of a prompt."""
        return self.visual_tokens + self.text_tokens + constants.TEMPLATE_TOKENS


@dataclass(frozen=True)
class Deployment:
    """One or several equal servers.

    Attributes:
        model: one of :data:`~lmdeploy_vico.checkpoints.sizes.MODELS`.
        gpu: of which kind all GPUs are.
        tp: GPUs of each server's language model.
        dp: servers.
        vision_devices: GPUs that do nothing but encode, for all servers; None for replicas on the servers' own GPUs.
        cores: of a CPU, for the preparation of each server.
        max_prefill_tokens: of a step.
    """

    model: str
    gpu: Gpu
    tp: int = 1
    dp: int = 1
    vision_devices: int | None = None
    cores: int = 8
    max_prefill_tokens: int = constants.MAX_PREFILL_TOKENS

    def __post_init__(self) -> None:
        if self.tp not in (works := working_tp(self.model)):
            size = MODELS[self.model].size
            raise PlanningError(
                f'The {self.model} has {size.heads} heads and {size.kv_heads} key-value heads, which LMDeploy cannot '
                f'split over --tp {self.tp}: {", ".join(map(str, works))} work.'
            )
        if (spare := self.memory.spare_bytes) < 0:
            raise PlanningError(
                f'The {self.model} does not fit {self.tp} x {self.gpu.name}: each GPU is {-spare / GIB:.1f} GiB short '
                f'of {self.gpu.memory / GIB:.1f}. {self.memory.larger()}'
            )

    @property
    def gpus(self) -> int:
        """GPUs of all servers, and those of the vision side."""
        return self.tp * self.dp + (self.vision_devices or 0)

    @property
    def language_model(self) -> LanguageModel:
        """The language model of one server."""
        return LanguageModel(self.model, self.gpu, self.tp)

    @property
    def encoders(self) -> int:
        """GPUs that encode, shared with the language model or not."""
        return self.tp * self.dp if self.vision_devices is None else self.vision_devices

    @property
    def memory(self) -> Memory:
        """The memory of each GPU of a server."""
        return Memory(self.model, self.gpu, self.tp, self.vision_devices is None, self.max_prefill_tokens)

    def request_blocks(self, work: Workload) -> int:
        """Return the KV blocks of a prompt."""
        return ceil(work.tokens / constants.BLOCK_TOKENS)

    def kv_bytes(self, work: Workload) -> int:
        """Return the bytes of KV cache that a prompt takes on all GPUs of a server together."""
        return self.request_blocks(work) * self.memory.cache.block * self.tp

    def in_flight(self, work: Workload) -> int:
        """Return the prompts for which a server has KV cache; raises PlanningError if there is none for one."""
        blocks, needed = self.memory.kv_blocks, self.request_blocks(work)
        if needed > blocks:
            raise PlanningError(
                f'A prompt of {work.tokens:.0f} tokens needs {needed} KV blocks, and a server of '
                f'{self.tp} x {self.gpu.name} has {blocks}. {self.memory.larger(needed)}'
            )
        return blocks // needed
