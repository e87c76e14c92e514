"""A simulation, event by event, of what closed forms do not say: how long requests wait for each other.

A request's picture is prepared on a core, part of the time alone. Its tiles join the queue of the vision side, which
takes them in padded batches. The visual tokens pass the two event loops one request at a time. The engine then takes
as many waiting prompts into a prefill step as ``max_prefill_token_num`` allows, the oldest first; a longer prompt is
cut into chunks, each a step of its own. GPUs that encode and prefill do these in turn. A request ends with its first
token.
"""

import math
import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import simpy

from lmdeploy_vico.planning.language import pieces
from lmdeploy_vico.planning.stages import Stages

Process = Generator[simpy.Event, Any, None]
WARM_UP = 0.1  # share of the requests that are left out, as they come to an empty server


def poisson(rate: float, count: int, seed: int = 0) -> Iterator[float]:
    """Return the seconds at which requests come that know nothing of each other, ``rate`` of them a second."""
    draw, now = random.Random(seed), 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        yield now


def simulate(stages: Stages, arrivals: Iterator[float]) -> list[float]:
    """Return the seconds from each request's arrival to its first token, in the order of arrival.

    Args:
        stages: of the deployment, for requests of one kind. Servers take them in turn.
        arrivals: seconds, in order.
    """
    world = simpy.Environment()
    tiles = Tiles(world)
    servers = [Server(world, stages, tiles) for _ in range(stages.deployment.dp)]
    for _ in range(stages.deployment.vision_devices or 0):
        world.process(encoder(world, stages, tiles))
    requests: list[Request] = []
    world.process(_arrive(world, servers, arrivals, requests))
    world.run()
    return [request.answered - request.arrived for request in requests]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by this share of them (0 to 1), after the warm-up."""
    steady = sorted(values[int(WARM_UP * len(values)) :])
    return steady[max(0, math.ceil(share * len(steady)) - 1)]


class Request:
    """One request: when it came and had its first token, tiles that are not encoded, and the event that all are."""

    def __init__(self, world: simpy.Environment, tiles: int) -> None:
        self.arrived = self.answered = float(world.now)
        self.tiles = tiles
        self.encoded = world.event()


class Tiles:
    """The queue of tiles of one vision side: each of its entries is the request that a tile belongs to."""

    def __init__(self, world: simpy.Environment) -> None:
        self.world = world
        self.queue: deque[Request] = deque()
        self.news = world.event()

    def put(self, request: Request) -> None:
        """Queue all tiles of a request, and wake who waits for some."""
        self.queue.extend([request] * request.tiles)
        self.news.succeed()
        self.news = self.world.event()

    def take(self, most: int) -> list[Request]:
        """Take up to so many tiles."""
        return [self.queue.popleft() for _ in range(min(most, len(self.queue)))]


def encoder(world: simpy.Environment, stages: Stages, tiles: Tiles) -> Process:
    """One GPU that does nothing but encode."""
    while True:
        while not tiles.queue:
            yield tiles.news
        batch = tiles.take(stages.tile_batch)
        yield world.timeout(stages.batch)
        _encoded(batch)


def _encoded(batch: Sequence[Request]) -> None:
    for request in batch:
        request.tiles -= 1
        if not request.tiles:
            request.encoded.succeed()


class Server:
    """One server: its cores, loops, and the GPUs of its language model."""

    def __init__(self, world: simpy.Environment, stages: Stages, tiles: Tiles) -> None:
        deployment = stages.deployment
        self.world, self.stages = world, stages
        self.shared = deployment.vision_devices is None
        self.tiles = Tiles(world) if self.shared else tiles
        self.cores = simpy.Resource(world, deployment.cores)
        self.alone = simpy.Resource(world)
        self.api_loop = simpy.Resource(world)
        self.engine_loop = simpy.Resource(world)
        self.prompts: deque[Request] = deque()
        self.news = world.event()
        self.chunks = list(pieces(stages.work.tokens, deployment.max_prefill_tokens))
        fitting = int(deployment.max_prefill_tokens // stages.work.tokens)
        self.together = max(1, min(fitting, deployment.in_flight(stages.work)))
        world.process(self._compute())

    def serve(self, request: Request) -> Process:
        """Take a request from its picture to the queue of the engine."""
        if self.stages.work.images:
            with self.cores.request() as core:
                yield core
                yield self.world.timeout(self.stages.prepare - self.stages.prepare_alone)
                yield from self._hold(self.alone, self.stages.prepare_alone)
            self.tiles.put(request)
            yield request.encoded
            yield from self._hold(self.api_loop, self.stages.send)
            yield from self._hold(self.engine_loop, self.stages.receive)
        self.prompts.append(request)
        self.news.succeed()
        self.news = self.world.event()

    def _hold(self, resource: simpy.Resource, seconds: float) -> Process:
        with resource.request() as turn:
            yield turn
            yield self.world.timeout(seconds)

    def _compute(self) -> Process:
        """The GPUs: a prefill step where prompts wait, and a round of batches where tiles of their own wait."""
        while True:
            while not self.prompts and not (self.shared and self.tiles.queue):
                yield self.news | self.tiles.news if self.shared else self.news
            if self.shared and self.tiles.queue:
                batch = self.tiles.take(self.stages.tile_batch * self.stages.deployment.tp)
                yield self.world.timeout(self.stages.batch)
                _encoded(batch)
            if self.prompts:
                yield from self._prefill()

    def _prefill(self) -> Process:
        taken = [self.prompts.popleft() for _ in range(min(self.together, len(self.prompts)))]
        for chunk in self.chunks:
            yield self.world.timeout(self.stages.deployment.language_model.step_seconds([chunk] * len(taken)))
        for request in taken:
            request.answered = self.world.now


def _arrive(
    world: simpy.Environment, servers: Sequence[Server], arrivals: Iterator[float], requests: list[Request]
) -> Process:
    for number, moment in enumerate(arrivals):
        yield world.timeout(max(0.0, moment - world.now))
        request = Request(world, servers[0].stages.work.tiles)
        requests.append(request)
        world.process(servers[number % len(servers)].serve(request))
