"""The configurations that several modules share, and the kinds of checkpoints."""

import os
from pathlib import Path

import pytest
from waiting import HANG

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
    LMDEPLOY_VICO_MAX_VIDEOS=str(PROMPT_VIDEOS), LMDEPLOY_VICO_SHUTDOWN_GRACE=str(HANG),
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

COMPRESSED = pytest.mark.served(
    '--logprobs-mode', 'raw_logprobs', LMDEPLOY_VICO_COMPRESSION='all', LMDEPLOY_VICO_EXIT_ON_ENGINE_DEATH='0',
)  # fmt: skip

KEY, OTHER_KEY, DOMAIN = 'secret', 'other', 'pictures.test'
KEYED = pytest.mark.served(
    '--api-keys', KEY, OTHER_KEY, '--allowed-media-domains', DOMAIN, LMDEPLOY_VICO_PAGE='1',
)  # fmt: skip

TWO_RANKS = pytest.mark.served(
    '--tp', '2', '--trust-remote-code', '--hf-overrides', '{"vico": {"compression": 0.25}}',
)  # fmt: skip

# LMDeploy's own classes, which need a plain checkpoint's remote code for its config.
PLAIN = {'flash': False, 'dtype': 'float32'}
LMDEPLOYS = pytest.mark.served('--trust-remote-code', checkpoint=PLAIN, LMDEPLOY_VICO='cpu')
