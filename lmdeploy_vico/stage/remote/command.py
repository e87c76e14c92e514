"""Starts encoders as actors on this machine, watches over them, and takes them down again."""

import logging
import os
import platform
import secrets
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmdeploy_vico import log
from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.checkpoints.fingerprint import vision_fingerprint
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.remote.channel import Hello
from lmdeploy_vico.stage.remote.cluster import (
    HEALTH,
    NAMESPACE,
    ClusterError,
    RayAnswer,
    RayChannel,
    join,
    names,
    require_protected,
)
from lmdeploy_vico.stage.remote.identity import Identity
from lmdeploy_vico.stage.remote.service import EncoderService
from lmdeploy_vico.vision.tile_encoder import TileEncoder

logger = logging.getLogger(__name__)

CALLS = 64  # that an actor answers side by side: each server has two batches with it, and a few prompts
PERIOD = 2.0  # seconds between two looks at the actors
READY = 600.0  # seconds in which an actor has to load its checkpoint


@dataclass(frozen=True)
class Plan:
    """What is started.

    Attributes:
        model: the checkpoint's directory, on this machine.
        cuda: whether each encoder takes a GPU, rather than cores.
        number: of encoders.
        address: of the cluster.
        insecure: whether a cluster without authentication may be joined.
        options: of which ``tile_batch``, ``cache_bytes``, ``kernels`` and ``vit_speedups`` are used.
    """

    model: Path
    cuda: bool
    number: int
    address: str
    insecure: bool
    options: Options


class EncoderActor(EncoderService):
    """The actor. It loads the checkpoint when it is started, and again when Ray restarts it.

    Args:
        model: the checkpoint's directory.
        fingerprint: of its vision side.
        cuda: whether it has a GPU.
        options: of the encoder.
        threads: of torch, on a CPU.
    """

    def __init__(self, model: str, fingerprint: str, cuda: bool, options: Options, threads: int) -> None:
        log.setup()
        # Tiles lie in Ray's shared memory, read-only; nothing here writes to them.
        warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
        if not cuda:
            torch.set_num_threads(threads)
        encoder = TileEncoder.load(
            Checkpoint(model),
            VicoConfig.from_pretrained(model),
            *('cuda:0' if cuda else 'cpu', None, options.tile_batch or None),
            speedups=options.vit_speedups,
            kernels=options.kernels,
        )
        identity = Identity.of(encoder, fingerprint, model, options.vit_speedups)
        # A CUDA device that has failed for good never comes back in its process: Ray starts another one.
        super().__init__(encoder, identity.hello(), options.cache_bytes, broken=lambda: os._exit(1))


class Encoders:
    """The actors that one command has started.

    Args:
        plan: what to start.

    Raises:
        ClusterError: the cluster cannot be joined, is not protected, or has no room.
        UnsupportedCheckpointError: the checkpoint cannot be used.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        config = VicoConfig.from_pretrained(plan.model)
        self.fingerprint = vision_fingerprint(plan.model, config)
        self._namespace = NAMESPACE + self.fingerprint
        self._joined = join(plan.address)
        self._channels: dict[str, RayChannel] = {}
        self._known: dict[str, str] = {}  # incarnations, by name
        self._asked: dict[str, RayAnswer] = {}
        try:
            require_protected(plan.address, plan.insecure)
            self._require_room()
        except ClusterError:
            self._leave()
            raise

    def start(self) -> None:
        """Start the actors; they load their checkpoints side by side."""
        node = ray.get_runtime_context().get_node_id()  # this machine's, which has the checkpoint
        resources = {'num_gpus': 1, 'num_cpus': 0} if self._plan.cuda else {'num_gpus': 0, 'num_cpus': 1}
        environment = {name: os.environ[name] for name in ('PYTHONPATH',) if name in os.environ}
        start = secrets.token_hex(3)  # process ids and names of machines repeat among containers
        remote: Any = ray.remote  # whose types do not know concurrency groups
        actor = remote(concurrency_groups={HEALTH: 1})(EncoderActor)
        for index in range(self._plan.number):
            name = f'encoder-{platform.node()}-{start}-{index}'
            handle = actor.options(
                name=name,
                namespace=self._namespace,
                lifetime='detached',
                max_restarts=-1,
                max_concurrency=CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                runtime_env={'env_vars': environment},
                **resources,
            ).remote(
                str(self._plan.model.resolve()), self.fingerprint, self._plan.cuda, self._plan.options,
                torch.get_num_threads(),
            )  # fmt: skip
            self._channels[name] = RayChannel(name, handle)
        logger.info(
            '%d encoders of %s (fingerprint %s) start in the Ray cluster at %s',
            *(self._plan.number, self._plan.model, self.fingerprint, ray.get_runtime_context().gcs_address),
        )

    def watch(self, stop: threading.Event) -> None:
        """Log what becomes of the actors, until told to stop.

        Raises:
            ClusterError: an actor cannot load the checkpoint, none is left, or the cluster has gone.
        """
        began = time.monotonic()
        while not stop.wait(PERIOD if self._known else 0.1):
            self.look()
            if len(self._known) < len(self._channels) and time.monotonic() - began > READY:
                missing = ', '.join(sorted(set(self._channels) - set(self._known)))
                raise ClusterError(f'{missing} did not load the checkpoint within {READY:g} s.')

    def look(self) -> None:
        """Look once at the actors."""
        existing = set(names(self._namespace))
        for name in set(self._known) - existing:
            logger.warning('encoder %s has been taken down by somebody else', name)
            del self._known[name], self._channels[name]
        for name, channel in list(self._channels.items()):
            asked = self._asked.setdefault(name, channel.call('hello'))
            if asked.ready(0):
                del self._asked[name]
                self._answered(name, asked)
        if not self._channels:
            raise ClusterError('No encoder of this command is left.')

    def _answered(self, name: str, asked: RayAnswer) -> None:
        try:
            hello: Hello = asked.result()
        except EncoderGoneError as error:
            if name not in self._known:
                raise ClusterError(f'{name} cannot start: {error}') from error
            logger.warning('encoder %s does not answer and is restarted: %s', name, error)
            return
        if self._known.get(name) != hello['incarnation']:
            logger.info(
                'encoder %s is ready%s: %s, %s, tile batch %d, kernels %s',
                *(name, ' again' if name in self._known else '', hello['device'], hello['dtype']),
                *(hello['tile_batch'], hello['kernels']),
            )
            self._known[name] = hello['incarnation']

    @property
    def ready(self) -> Mapping[str, str]:
        """The incarnations of the encoders that have answered, by name."""
        return self._known

    def stop(self) -> None:
        """Take the actors down; what they were doing is done by others. Leave the cluster."""
        take_down(self._namespace, list(self._channels))
        self._leave()

    def _leave(self) -> None:
        if self._joined:
            ray.shutdown()

    def _require_room(self) -> None:
        wanted, number = ('GPU', 'GPUs') if self._plan.cuda else ('CPU', 'CPUs'), self._plan.number
        node = ray.get_runtime_context().get_node_id()
        here = next((one for one in ray.nodes() if one['NodeID'] == node), None)
        there = int(here['Resources'].get(wanted[0], 0)) if here else 0
        if there < number:
            raise ClusterError(
                f'{number} encoders need {number} {wanted[1]} of this machine, and Ray counts {there} on it: start '
                f'fewer (--num), or `ray start` with more (--num-{wanted[1].lower()}).'
            )


def take_down(namespace: str, encoders: Sequence[str]) -> None:
    """Kill actors for good; those that have ended already are passed over."""
    for name in encoders:
        try:
            ray.kill(ray.get_actor(name, namespace), no_restart=True)
        except ValueError:
            continue
        logger.info('encoder %s is taken down', name)


def gpus() -> int:
    """How many GPUs this process sees; each is for one encoder."""
    return torch.cuda.device_count()
