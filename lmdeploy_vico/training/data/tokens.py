"""A checkpoint's tokenizer, as the server has it."""

from pathlib import Path
from typing import Any

from lmdeploy_vico.training import TrainingError


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint; no code that comes with it is run.

    Raises:
        TrainingError: it has no ``tokenizer.json``, or no chat template.
    """
    from transformers import PreTrainedTokenizerFast

    if not (path / 'tokenizer.json').is_file():
        raise TrainingError(f'{path} has no tokenizer.json.')
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if not tokenizer.chat_template:
        raise TrainingError(f'{path} has no chat template, which says how conversations are written.')
    return tokenizer
