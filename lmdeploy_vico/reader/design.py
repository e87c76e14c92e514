"""The shape of the reader's model, and every file of its checkpoint but the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy_vico.checkpoints.random.configuration import Size, checkpoint_config
from lmdeploy_vico.checkpoints.random.tiny import write_configuration
from lmdeploy_vico.checkpoints.random.tokenizer import write_tokenizer
from lmdeploy_vico.reader.documents.codes import KEYS
from lmdeploy_vico.reader.documents.pictures import (
    COLOUR_QUESTION,
    COLOURS,
    PHOTO_QUESTION,
    PHOTOGRAPHS,
    SHAPE_QUESTION,
    SHAPES,
)
from lmdeploy_vico.reader.documents.print import CODE_QUESTION

# No experts: the language model is a Qwen3.
SIZE = Size(
    vit_width=64, vit_layers=4, vit_heads=2, vit_mlp=192, hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32,
    mlp=320, experts=0, experts_per_token=0, expert_mlp=0,
)  # fmt: skip
DTYPE = 'bfloat16'
ROLES = ('user', 'assistant')
ROWS = 128  # the vocabulary is filled up to a multiple


def corpus() -> str:
    """What the tokenizer has to have words for: every question and every answer but the codes."""
    codes = [CODE_QUESTION.format(key) for key in KEYS]
    questions = [*codes, SHAPE_QUESTION, COLOUR_QUESTION, PHOTO_QUESTION]
    return '\n'.join([*questions, *SHAPES, *COLOURS, *PHOTOGRAPHS, *ROLES])


def vico_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A ViCO model's config, from that of the plain checkpoint that it is made of: nothing is compressed yet."""
    return dict(plain) | {'flash_mode': True, 'flash_relative_threshold': 0.0, 'flash_absolute_threshold': 1.0}


def write_all_but_weights(path: Path) -> dict[str, Any]:
    """Write tokenizer and configuration of the plain model into a folder; return the content of ``config.json``."""
    token_ids = write_tokenizer(path, corpus())
    rows = -(-len(token_ids) // ROWS) * ROWS
    config = checkpoint_config(SIZE, 'dense', 'layer_norm', rows, token_ids, flash=False, dtype=DTYPE)
    write_configuration(path, config, token_ids)
    return config
