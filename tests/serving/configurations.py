"""The configurations that several modules share, and the kinds of checkpoints."""

import os
from pathlib import Path

import pytest

KINDS = {
    'layer_norm, dense': {},
    'rms_norm, dense': {'vit': 'rms_norm'},
    # In float32: bfloat16 rounding flips nearly tied experts, here and in any other implementation.
    'layer_norm, MoE': {'llm': 'moe', 'dtype': 'float32'},
}
DEFAULT = pytest.mark.served()

BLOCK = 64  # tokens of a KV block
CACHING = pytest.mark.served(
    '--enable-prefix-caching', '--cache-block-seq-len', str(BLOCK), '--max-prefill-token-num', '512',
    LMDEPLOY_VICO_SYNTHETIC_IMAGES='1',
)  # fmt: skip

SESSION_LEN = 16384  # tokens
MEMORY = 2**28  # bytes of decoded pictures
PROMPT_IMAGES, PROMPT_VIDEOS, PROMPT_TILES = 200, 3, 400
LIMITED = pytest.mark.served(
    '--session-len', str(SESSION_LEN), LMDEPLOY_VICO_MAX_DECODED_BYTES=str(MEMORY),
    LMDEPLOY_VICO_MAX_IMAGES=str(PROMPT_IMAGES), LMDEPLOY_VICO_MAX_PROMPT_TILES=str(PROMPT_TILES),
    LMDEPLOY_VICO_MAX_VIDEOS=str(PROMPT_VIDEOS),
)  # fmt: skip

# The unmodified server on a stand-in for TurboMind's binding, with a driver that is none: tests/turbomind/.
TESTS = Path(__file__).parents[1]
STAND_IN = {
    'PYTHONPATH': os.pathsep.join([str(TESTS / 'turbomind' / 'site'), os.environ.get('PYTHONPATH', '')]),
    'LMDEPLOY_VICO_LANGUAGE_ENGINE': 'turbomind',
    'LMDEPLOY_VICO_VISION_DEVICE': 'cpu',
}
ON_STAND_IN = pytest.mark.served(
    '--enable-prefix-caching', '--session-len', '8192', **STAND_IN, LMDEPLOY_VICO_SYNTHETIC_IMAGES='1'
)

LOGPROBS = pytest.mark.served('--logprobs-mode', 'raw_logprobs')
