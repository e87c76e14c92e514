"""What LMDeploy says of its own load."""

from functools import partial
from typing import Any

from lmdeploy.metrics.metrics_processor import metrics_processor

from lmdeploy_vico.adapter.server.pressure.valve import Reading, Valve
from lmdeploy_vico.options import Options


def valve_of(engine: Any, options: Options) -> Valve | None:
    """The valve of a server; None where it is off.

    Args:
        engine: LMDeploy's AsyncEngine.
        options: the server's.
    """
    if not options.pressure_compression:
        return None
    return Valve(options.pressure_compression, options.pressure_waiting, partial(read, engine))


async def read(engine: Any) -> Reading:
    """Ask the engine: one message to its process and back.

    Prompts wait in its scheduler, and in this process while all of its ``--max-batch-size`` places are taken. With
    prefix caching its blocks stay in use as long as nobody else needs them, so their share says nothing.
    """
    metrics = await engine.get_schedule_metrics()
    here = max(metrics_processor.scheduler_stats.num_api_waiting_reqs, 0)
    caching = engine.backend_config.enable_prefix_caching
    return Reading(metrics.waiting_seqs + here, 0.0 if caching else metrics.cache_usage)
