"""What the stand-in accepts as a prompt. It is stricter than ``input_processor.cc``, which checks less."""

from collections.abc import Mapping
from typing import Any

import torch

INPUTS = {'input_ids', 'input_embeddings', 'input_embedding_ranges'}


class InvalidError(Exception):
    """A request that C++ would refuse, or not notice and serve wrongly."""


def embedded(
    inputs: Mapping[str, torch.Tensor], mm_inputs: Any, embed: torch.nn.Embedding, dtype: torch.dtype
) -> torch.Tensor:
    """Return the embeddings of a prompt, ``[length, H]`` in float32.

    Args:
        inputs: as the binding is given them.
        mm_inputs: those of TurboMind's own vision models.
        embed: the language model's.
        dtype: in which embeddings have to come.

    Raises:
        InvalidError: they are not as they have to be.
    """
    ids = inputs['input_ids']
    vocabulary, hidden = embed.weight.shape
    _require(mm_inputs is None, 'there is multimodal input')
    _require(set(inputs) <= INPUTS, f'unknown inputs {sorted(inputs)}')
    _require(ids.ndim == 1 and ids.dtype == torch.int32 and len(ids), 'input_ids are no list of int32')
    _require(ids.min() >= 0 and ids.max() < vocabulary, 'an id is outside the vocabulary')
    embeddings = embed(ids)
    if len(inputs) > 1:
        _require(set(inputs) == INPUTS, 'embeddings and ranges come together')
        values, ranges = inputs['input_embeddings'], inputs['input_embedding_ranges']
        _require(values.ndim == 2 and values.is_contiguous(), 'embeddings are not one matrix, row after row')
        _require(values.dtype == dtype, f'embeddings are {values.dtype} in an engine of {dtype}')
        _require(values.shape[1] == hidden, f'embeddings have {values.shape[1]} values, not {hidden}')
        _require(values.isfinite().all(), 'an embedding is not finite')
        _require(ranges.ndim == 2 and ranges.shape[1] == 2 and ranges.dtype == torch.int32, 'ranges are not int32')
        offset, last = 0, 0
        for begin, end in ranges.tolist():
            _require(begin >= last, 'ranges are not sorted')
            _require(begin < end <= len(ids), 'a range is empty or outside the prompt')
            _require(offset + end - begin <= len(values), 'there are fewer embeddings than their ranges say')
            embeddings[begin:end] = values[offset : offset + end - begin].float()
            offset, last = offset + end - begin, end
        _require(offset == len(values), 'there are more embeddings than their ranges say')
    return embeddings


def _require(sound: Any, problem: str) -> None:
    if not sound:
        raise InvalidError(problem)
