"""The constants of the model, each with its source. docs/planning.md says what each of them decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# ----- Language model on a GPU

# Matrix products and all else that grows with the tokens: share of the peak FLOP/s. Published prefills reach 30 to 50 %
# (zeroentropy.dev/concepts/mfu), and LMDeploy runs those with visual tokens eagerly. Speed-ups hardly depend on it.
PRODUCTS = 0.5
# Attention: FlashAttention-3 reaches 565 of an H100's 989 TFLOP/s at 2,048 tokens and 128 channels a head
# (pytorch/benchmark#2391), and LMDeploy uses it on Hopper.
ATTENTION = 565 / 989
# Memory: a large copy on an H200 reaches 4.3 of its 4.8 TB/s.
BANDWIDTH = 4.3 / 4.8
# All-reduce: NCCL reaches 370 of the 450 GB/s of NVLink 4, the rest is protocol (NVIDIA/nccl-tests#212). In-network
# reduction is faster, but for messages larger than a prefill's.
ALL_REDUCE = 370 / 450
# Seconds before an all-reduce moves anything: an assumption. Two machines take 46 us (NVIDIA/nccl#1244), one less.
ALL_REDUCE_LATENCY = 20e-6

# ----- LMDeploy 0.18

MAX_PREFILL_TOKENS = 8192  # tokens of a step: PytorchEngineConfig.max_prefill_token_num
BLOCK_TOKENS = 64  # tokens of a KV block: PytorchEngineConfig.block_size
KV_SHARE = 0.8  # of the free memory: PytorchEngineConfig.cache_max_entry_count
MAX_BATCH = 1024  # sequences for which it reserves logits: lmdeploy.utils.get_max_batch_size of such GPUs

# Tokens around a request's own text: 77 text tokens of a prompt with 64, in benchmarks/results/first-token-cpu.json.
TEMPLATE_TOKENS = 13

# ----- Vision side

# Tiles/s of one H200, by the ViT's width: what the project aims at (TILE_RATES of benchmarks/gates/targets.py). Other
# GPUs are taken to differ as their FLOP/s do.
TILE_RATES = {1024: 600.0, 3200: 48.0}
TILE_RATES_OF = 'H200'
# Tiles of a device batch, which is padded, by the ViT's width: CUDA_TILE_BATCH of lmdeploy_vico/vision/tile_encoder.py.
TILE_BATCH = {1024: 8, 3200: 2}
# Bytes of working memory of the vision side on each of its GPUs: an estimate.
VISION_WORKING = 7 * 2**30 // 10

# ----- Preparation, on CPUs (benchmarks/results/vision-cpu.json, docs/measurements.md)

# Seconds of a core for the picture of ten tiles, and the tiles of that: noisy pictures, of which two cores make 45.2 a
# second when a second thread gives 1.7 times the rate of one.
PREPARE_SECONDS = 0.037
PREPARED_TILES = 10
# The share of it that no other thread can do at the same time: 7 to 19 %, for pictures of different sizes.
PREPARE_ALONE = 0.19

# ----- Hand-over of visual tokens, on CPUs (benchmarks/results/handover-cpu.json, ten tiles at a width of 4096)

HANDED_BYTES = 2 * 10 * 256 * 4096
SEND_SECONDS = 0.0108  # processor time of the API process's loop
RECEIVE_SECONDS = 0.0045  # of the engine's loop
FORWARD_SECONDS = 0.0063  # of the engine's loop once more, where it sends them on to ranks through Ray


@dataclass(frozen=True)
class Fitted:
    """What is fitted to the rows with 64 text tokens of the paper's Table 4: ``lmdeploy-vico plan --check`` repeats it.

    Attributes:
        request: seconds of a step that the GPUs wait for each prompt in it: scheduling, copies, sampling.
        more: seconds on top, for models that need more. The 30B's ratios are lower than its FLOP say, at 64 and at 512
            tokens; the 241B's, also a mixture of experts, are not. Why is not known.
    """

    request: float
    more: dict[str, float] = field(default_factory=dict)

    def seconds(self, model: str) -> float:
        """Return the seconds of a prompt of this model."""
        return self.request + self.more.get(model, 0.0)


# What `lmdeploy-vico plan --check` prints as fitted again.
FITTED = Fitted(request=0.248e-3, more={'30B-A3B': 0.882e-3})

# ----- Three runs of a tiny language model alone on a CPU: benchmarks/results/llm-cpu-1.json to llm-cpu-3.json

CpuRun = Mapping[tuple[int, float], float]  # a number for each amount of text tokens and compression
# Seconds of a processor that the engine took for a request, in each run.
CPU_SECONDS: tuple[CpuRun, ...] = (
    {
        (64, 0.0): 0.472,
        (64, 0.25): 0.3516,
        (64, 0.5): 0.2298,
        (64, 0.75): 0.1147,
        (512, 0.0): 0.551,
        (512, 0.25): 0.4442,
        (512, 0.5): 0.3148,
        (512, 0.75): 0.2043,
    },
    {
        (64, 0.0): 0.4859,
        (64, 0.25): 0.3209,
        (64, 0.5): 0.2386,
        (64, 0.75): 0.1188,
        (512, 0.0): 0.5769,
        (512, 0.25): 0.4378,
        (512, 0.5): 0.3103,
        (512, 0.75): 0.1945,
    },
    {
        (64, 0.0): 0.4208,
        (64, 0.25): 0.3095,
        (64, 0.5): 0.1996,
        (64, 0.75): 0.0997,
        (512, 0.0): 0.5192,
        (512, 0.25): 0.3799,
        (512, 0.5): 0.268,
        (512, 0.75): 0.1692,
    },
)
# Requests/s, in each run.
CPU_REQUESTS_PER_SECOND: tuple[CpuRun, ...] = (
    {
        (64, 0.0): 2.093,
        (64, 0.25): 2.815,
        (64, 0.5): 4.192,
        (64, 0.75): 8.398,
        (512, 0.0): 1.798,
        (512, 0.25): 2.218,
        (512, 0.5): 3.104,
        (512, 0.75): 4.697,
    },
    {
        (64, 0.0): 2.036,
        (64, 0.25): 3.067,
        (64, 0.5): 4.111,
        (64, 0.75): 7.766,
        (512, 0.0): 1.715,
        (512, 0.25): 2.256,
        (512, 0.5): 3.172,
        (512, 0.75): 5.019,
    },
    {
        (64, 0.0): 2.354,
        (64, 0.25): 3.184,
        (64, 0.5): 4.906,
        (64, 0.75): 9.361,
        (512, 0.0): 1.912,
        (512, 0.25): 2.607,
        (512, 0.5): 3.683,
        (512, 0.75): 5.772,
    },
)
