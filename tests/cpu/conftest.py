"""One engine per model kind, started once: starting engines is what takes the time."""

import pytest
import torch
from cpu.tiny_text import make_adapter, make_text_checkpoint
from lmdeploy import PytorchEngineConfig, pipeline
from transformers import AutoTokenizer

if torch.cuda.is_available():
    collect_ignore_glob = ['test_*.py']


@pytest.fixture(scope='session')
def dense_checkpoint(tmp_path_factory):
    return make_text_checkpoint(tmp_path_factory.mktemp('dense'))


@pytest.fixture(scope='session')
def moe_checkpoint(tmp_path_factory):
    return make_text_checkpoint(tmp_path_factory.mktemp('moe'), moe=True)


@pytest.fixture(scope='session')
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp('lora') / 'adapter')


@pytest.fixture(scope='session')
def tokenizer(dense_checkpoint):
    return AutoTokenizer.from_pretrained(dense_checkpoint)


@pytest.fixture(scope='session')
def dense(dense_checkpoint, adapter):
    """Dense model in float32 with prefix caching, long prompts in chunks of 512, and a LoRA adapter named ``tiny``."""
    config = PytorchEngineConfig(
        session_len=2048,
        block_size=64,
        enable_prefix_caching=True,
        max_prefill_token_num=512,
        adapters={'tiny': str(adapter)},
        logprobs_mode='raw_logprobs',
    )
    with pipeline(str(dense_checkpoint), backend_config=config) as pipe:
        yield pipe


@pytest.fixture(scope='session')
def bfloat16(dense_checkpoint):
    """The dense model in bfloat16."""
    config = PytorchEngineConfig(session_len=2048, dtype='bfloat16', logprobs_mode='raw_logprobs')
    with pipeline(str(dense_checkpoint), backend_config=config) as pipe:
        yield pipe


@pytest.fixture(scope='session')
def moe(moe_checkpoint):
    """Mixture of experts in float32, with blocks of 128 tokens."""
    config = PytorchEngineConfig(session_len=2048, block_size=128, kernel_block_size=128, logprobs_mode='raw_logprobs')
    with pipeline(str(moe_checkpoint), backend_config=config) as pipe:
        yield pipe


@pytest.fixture(scope='session')
def moe_bfloat16(moe_checkpoint):
    """The mixture of experts in bfloat16."""
    config = PytorchEngineConfig(session_len=2048, dtype='bfloat16', logprobs_mode='raw_logprobs')
    with pipeline(str(moe_checkpoint), backend_config=config) as pipe:
        yield pipe
