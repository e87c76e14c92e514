"""What LMDeploy says of its own load."""

import logging
from functools import partial
from typing import Any

from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.engine.mp_engine.zmq_rpc import RPCServerDeadError

from lmdeploy_vico.adapter.server.pressure.valve import Reading, Valve
from lmdeploy_vico.options import Options

logger = logging.getLogger(__name__)


def valve_of(engine: Any, options: Options) -> Valve | None:
    """The valve of a server; None where it is off.

    Args:
        engine: LMDeploy's AsyncEngine.
        options: the server's.
    """
    if not options.pressure_compression:
        return None
    config = engine.backend_config
    if isinstance(config, TurbomindEngineConfig) and config.dp > 1:
        logger.warning(
            'pressure_compression goes by the first of %d data-parallel ranks: TurboMind tells of no other one',
            config.dp,
        )
    return Valve(options.pressure_compression, options.pressure_waiting, partial(read, engine))


async def read(engine: Any) -> Reading:
    """Ask the engine: one message to its process and back.

    Prompts wait in its scheduler, and in this process while all of its ``--max-batch-size`` places are taken.
    """
    try:
        metrics = await engine.get_schedule_metrics()
    except RPCServerDeadError:  # with its process, of which the server says what has become
        return Reading(0, 0.0)
    return Reading(metrics.waiting_seqs + _waiting_here(engine), metrics.cache_usage if _says_kv_use(engine) else 0.0)


def _waiting_here(engine: Any) -> int:
    """The requests that wait for a place in the engine.

    LMDeploy's own count of them, ``num_api_waiting_reqs``, only grows when clients leave while they wait.
    """
    places = engine.session_mgr.request_handle_pool.pool
    return 0 if places is None else sum(not waiting.done() for waiting in places._getters)  # None before the first use


def _says_kv_use(engine: Any) -> bool:
    """Whether the share of the KV cache in use tells how much the engine has to do.

    With prefix caching, blocks are kept as long as nobody else needs them. LMDeploy's PyTorch engine does not count
    those, unless an environment variable has it count them.
    """
    config = engine.backend_config
    counts_requests = isinstance(config, PytorchEngineConfig) and envs.enable_request_cache_usage_metric
    return counts_requests or not config.enable_prefix_caching
