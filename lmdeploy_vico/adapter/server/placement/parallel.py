"""Whether the engine can be split as the operator asks, said before anything is loaded."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lmdeploy_vico.adapter.server.placement.devices import has_joined, joined_cluster, parallelism
from lmdeploy_vico.options import OptionError

if TYPE_CHECKING:
    from lmdeploy.messages import PytorchEngineConfig

logger = logging.getLogger(__name__)

VOCABULARY_PADDING = 64  # LMDeploy pads the vocabulary to a multiple of it before it is split
MOST = 64  # ranks that are tried for the list of what works
PATIENCE = 60  # seconds for a Ray cluster to answer
# What joins it. Ray ends a process for some of its errors, and changes the environment.
ASK = """
import ray
ray.init('auto', log_to_driver=False, logging_level='ERROR')
there, free = (resources.get('GPU', 0) for resources in (ray.cluster_resources(), ray.available_resources()))
print(f'{there:g} {free:g}')
"""
GPUS = re.compile(r'(?P<there>[\d.e+]+) (?P<free>[\d.e+]+)')
HEADS, KEY_VALUE = 'attention heads', 'key-value heads'


def require_parallelism(llm: Any, engine: 'PytorchEngineConfig') -> None:
    """Refuse numbers of ranks that do not divide the language model, or for which there are no devices.

    A Ray cluster that has too few GPUs is only warned of, since it may grow.

    Args:
        llm: the language model's config, of ``transformers``.
        engine: LMDeploy's config.

    Raises:
        OptionError: the message says what does not fit, and what works.
    """
    try:
        dist = parallelism(engine)
    except AssertionError as error:
        raise OptionError(
            f'--tp {engine.tp}, --dp {engine.dp} and --ep {engine.ep} do not fit each other: {error}.'
        ) from error
    _require_split('--tp', dist.attn_tp, attention_parts(llm))
    _require_split('--tp', dist.moe_tp, expert_columns(llm))
    _require_split('--ep', dist.ep, experts(llm))
    devices = torch.cuda.device_count()
    if (cluster := joined_cluster(engine, dist)) is not None:
        if not has_joined(engine):
            say_what_room_there_is(cluster, dist.attn_tp)
    elif torch.cuda.is_available() and dist.attn_tp > devices:
        raise OptionError(f'--tp {dist.attn_tp} needs as many devices, and this server sees {devices}.')


def say_what_room_there_is(cluster: str, ranks: int) -> None:
    """Warn of a Ray cluster that does not have room for all ranks, or cannot be joined.

    A process of its own joins it, as the engine's is going to. It is not refused: it may grow, or come back.

    Args:
        cluster: its address.
        ranks: each of which takes a GPU.
    """
    if '://' in cluster:  # of a Ray client, which has other ways to join
        return
    logger.info('asking the Ray cluster at %s for its GPUs', cluster)
    try:
        asked = subprocess.run(
            [sys.executable, '-c', ASK], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        found, said = None, f'no answer within {PATIENCE} s'
    else:
        found = GPUS.fullmatch(asked.stdout.strip())
        said = ' '.join(asked.stderr.split()[-60:])
    if found is None:
        logger.warning(
            'the Ray cluster at %s, of RAY_ADDRESS or an earlier "ray start", cannot be joined: once everything else '
            'has been loaded, the engine will try, too. Ray says: %s',
            *(cluster, said),
        )
    elif ranks > float(found['free']):
        logger.warning(
            'the engine needs %d GPUs of the Ray cluster at %s, which has %s, of which %s are free: once everything '
            'else has been loaded, it waits for them for half an hour',
            *(ranks, cluster, found['there'], found['free']),
        )


def attention_parts(llm: Any) -> dict[str, int]:
    """What the ranks of attention, and of the vocabulary, share."""
    padded = -(-llm.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    return {HEADS: llm.num_attention_heads, KEY_VALUE: llm.num_key_value_heads, 'padded vocabulary entries': padded}


def expert_columns(llm: Any) -> dict[str, int]:
    """What the ranks of a mixture of experts share: empty for a dense model."""
    columns = getattr(llm, 'moe_intermediate_size', None)
    return {'columns of an expert': columns} if columns else {}


def experts(llm: Any) -> dict[str, int]:
    """What expert-parallel ranks share: empty for a dense model."""
    count = getattr(llm, 'num_experts', None)
    return {'experts': count} if count else {}


def _require_split(option: str, ranks: int, parts: Mapping[str, int]) -> None:
    for name, count in parts.items():
        if not _splits(name, count, ranks):
            works = ', '.join(map(str, _working(parts)))
            raise OptionError(f'{option} {ranks} does not work: {ranks} ranks cannot share {count} {name}. {works} do.')


def _splits(name: str, count: int, ranks: int) -> bool:
    """Whether each of so many ranks gets as much; where there are fewer key-value heads than ranks they are copied."""
    return ranks % count == 0 if name == KEY_VALUE and count < ranks else count % ranks == 0


def _working(parts: Mapping[str, int]) -> Iterator[int]:
    for ranks in range(1, MOST + 1):
        if all(_splits(name, count, ranks) for name, count in parts.items()):
            yield ranks
