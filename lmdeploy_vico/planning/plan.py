"""The answer of ``lmdeploy-vico plan``: a cell for each amount of text and each compression."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmdeploy_vico.planning import PlanningError
from lmdeploy_vico.planning.calibration.paper import speedup
from lmdeploy_vico.planning.deployment import Deployment, Workload
from lmdeploy_vico.planning.simulation import percentile, poisson, simulate
from lmdeploy_vico.planning.stages import Stages

USUAL_LOAD = 0.7  # of what the deployment answers at most without compression: the rate where none is given
FULL_LOAD = 0.9  # of what a deployment answers at most: more is not planned for, as queues grow without end at 1
REQUESTS = 2000  # of a simulation, as in the paper's measurements


@dataclass(frozen=True)
class Cell:
    """What the deployment does with requests of one kind.

    Attributes:
        text_tokens, compression: of the requests.
        prompt_tokens: of each, on average where no whole number of tiles gives the compression.
        requests_per_second: that it answers at most.
        speedup: how many times as many as without compression.
        language_model_speedup: the same of the language model alone.
        rate: requests/s at which times to the first token are simulated.
        ttft_p50_ms, ttft_p99_ms: these times; None where the rate is more than it can answer.
        kv_bytes_per_request: on all GPUs of a server together.
        requests_in_flight: for which all servers together have KV cache.
        bottleneck: the slowest stage.
        seconds: for each stage, between two requests that the whole deployment lets through.
        gpus: that answer a rate that was asked for, vision devices included; None where none was.
    """

    text_tokens: int
    compression: float
    prompt_tokens: float
    requests_per_second: float
    speedup: float
    language_model_speedup: float
    rate: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    kv_bytes_per_request: int
    requests_in_flight: int
    bottleneck: str
    seconds: dict[str, float]
    gpus: int | None


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Attributes:
        rate: requests/s; None for a usual load.
        ttft_p99_ms: the 99th percentile of the time to the first token that must not be exceeded; None for any.
        requests: of each simulation.
        seed: of the arrivals.
    """

    rate: float | None = None
    ttft_p99_ms: float | None = None
    requests: int = REQUESTS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise PlanningError(f'--rate takes requests a second, more than 0, not {self.rate:g}.')
        if self.ttft_p99_ms is not None and not 0 < self.ttft_p99_ms < math.inf:
            raise PlanningError(f'--ttft-p99 takes milliseconds, more than 0, not {self.ttft_p99_ms:g}.')
        if self.ttft_p99_ms is not None and self.rate is None:
            raise PlanningError('--ttft-p99 says how many GPUs a rate needs: add --rate.')


def cells(
    deployment: Deployment,
    tiles: int,
    text_tokens: Sequence[int],
    compressions: Sequence[float],
    target: Target,
    images: bool = True,
) -> list[Cell]:
    """Return the cells, in the order of the arguments.

    Raises:
        PlanningError: a compression is out of range, a prompt does not fit, or no number of servers keeps the limit.
    """
    return [
        cell(deployment, Workload(tiles, text, compression, images), target)
        for text in text_tokens
        for compression in compressions
    ]


def cell(deployment: Deployment, work: Workload, target: Target) -> Cell:
    """Return one cell; raises PlanningError as :func:`cells`."""
    stages = Stages(deployment, work)
    uncompressed = Stages(deployment, replace(work, compression=0.0))
    rate = target.rate or USUAL_LOAD * uncompressed.requests_per_second
    times = None
    if rate < stages.requests_per_second:
        times = simulate(stages, poisson(rate, target.requests, target.seed))
    return Cell(
        text_tokens=work.text_tokens,
        compression=work.compression,
        prompt_tokens=work.tokens,
        requests_per_second=stages.requests_per_second,
        speedup=stages.requests_per_second / uncompressed.requests_per_second,
        language_model_speedup=speedup(
            deployment.language_model, work.text_tokens, work.compression, work.tiles, deployment.max_prefill_tokens
        ),
        rate=rate,
        ttft_p50_ms=1e3 * percentile(times, 0.5) if times else None,
        ttft_p99_ms=1e3 * percentile(times, 0.99) if times else None,
        kv_bytes_per_request=deployment.kv_bytes(work),
        requests_in_flight=deployment.in_flight(work) * deployment.dp,
        bottleneck=stages.bottleneck,
        seconds=stages.seconds(),
        gpus=gpus_for(deployment, work, target) if target.rate else None,
    )


def gpus_for(deployment: Deployment, work: Workload, target: Target) -> int:
    """Return the GPUs of the fewest servers that answer the target's rate at no more than 90 % of what they could.

    All servers are like one of the deployment, with as many GPUs of the vision side for each. Each gets its part of
    the requests, in turn. A limit of the time to the first token is tried by simulation.

    Raises:
        PlanningError: a request exceeds the limit even alone.
    """
    rate, limit = target.rate, target.ttft_p99_ms
    assert rate is not None
    encoders = deployment.vision_devices
    per_server = None if encoders is None else max(1, math.ceil(encoders / deployment.dp))
    one = replace(deployment, dp=1, vision_devices=per_server)
    stages = Stages(one, work)
    servers = math.ceil(rate / (FULL_LOAD * stages.requests_per_second))
    if limit is None:
        return servers * one.gpus
    [alone] = simulate(stages, iter([0.0]))
    if 1e3 * alone > limit:
        raise PlanningError(
            f'--ttft-p99 {limit:g} cannot be kept at {work.compression:.0%} compression: a request '
            f'alone takes {1e3 * alone:.0f} ms, whatever the number of servers. Raise the limit, or --tp.'
        )

    def keeps(servers: int) -> bool:
        times = simulate(stages, poisson(rate / servers, target.requests, target.seed))
        return 1e3 * percentile(times, 0.99) <= limit

    too_few, enough = servers - 1, servers
    while not keeps(enough):
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        between = (too_few + enough) // 2
        too_few, enough = (too_few, between) if keeps(between) else (between, enough)
    return enough * one.gpus
