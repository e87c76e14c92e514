"""Finds encoders as they come, and gives up those that are gone."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.stage.errors import DeviceStartError, EncoderGoneError
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.remote.channel import Answer, Channel, Cluster, Hello
from lmdeploy_vico.stage.remote.encoder import RemoteEncoder
from lmdeploy_vico.stage.remote.identity import difference
from lmdeploy_vico.stage.remote.work import Lane, RemoteWork

logger = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between two looks at the cluster
SILENCE = 30.0  # seconds without an answer after which an encoder is given up; its machine may have vanished


@dataclass(frozen=True)
class Quest:
    """What a server looks for.

    Attributes:
        cluster: where.
        fingerprint: of its checkpoint's vision side.
        config: its checkpoint's.
        seconds: that the start, and prompts, wait while no encoder is there.
    """

    cluster: Cluster
    fingerprint: str
    config: VicoConfig
    seconds: float


class NoEncoderError(RuntimeError):
    """No encoder is there that the server may use; the message says what to do."""


@dataclass(frozen=True)
class _Asked:
    answer: Answer
    since: float


class Fleet:
    """The encoders that a server uses, each fed by a thread: a :class:`~lmdeploy_vico.stage.workers.protocol.Worker`.

    Once a second it looks who is there, and asks everybody for a sign of life. One that is new is used at once. One
    that is gone, or is silent for long, is given up: whatever it was given goes to others. While none is there prompts
    wait, at most for so long as the quest says; from then on they are refused until one comes.

    Args:
        quest: what to look for.
        work: the stage's.
        clock: seconds, always increasing.
    """

    def __init__(self, quest: Quest, work: RemoteWork, clock: Callable[[], float] = time.monotonic) -> None:
        self._quest, self._work, self._clock = quest, work, clock
        self._metrics = stage_metrics()
        self._lanes: dict[str, Lane] = {}  # by the encoder's name
        self._ended: list[Lane] = []
        self._asked: dict[str, _Asked] = {}
        self._refused: dict[str, str] = {}  # why encoders are not used, by name
        self._alone_since = clock()
        self._ready: Future[None] = Future()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name='vico-fleet', daemon=True)

    def start(self) -> None:
        """Begin to look for encoders."""
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when an encoder is there.

        Raises:
            DeviceStartError: there is none, and there was none for as long as the quest says; or one is there that must
                not be used.
        """
        self._ready.result()

    def join(self) -> None:
        """Return when all threads have ended, and leave the cluster."""
        for lane in [*self._lanes.values(), *self._ended]:
            lane.join()
        self._work.close()
        self._closing.set()  # not before: somebody has to notice if an encoder does not answer
        if self._thread.ident is not None:
            self._thread.join()
        self._metrics.remote_encoders.set(0)
        self._quest.cluster.close()

    def _run(self) -> None:
        complained = False
        while not self._closing.is_set():
            try:
                self.look()
                complained = False
            except Exception as error:  # the cluster may be out of reach for a while; what is known goes on
                if not complained:
                    logger.error('%s cannot be asked for encoders: %s', self._quest.cluster.name, error)
                complained = True
            self._mind_absence()
            self._closing.wait(PERIOD)
        self._cannot_start('the stage was closed.')

    def look(self) -> None:
        """Look once who is there."""
        channels = {channel.name: channel for channel in self._quest.cluster.find()}
        for name in set(self._lanes) - set(channels):
            self._give_up(name, 'it has ended')
        for name, channel in channels.items():
            self._ask(name, channel)
        self._asked = {name: asked for name, asked in self._asked.items() if name in channels}
        if not self._lanes and not self._asked and self._refused:
            self._cannot_start(next(iter(self._refused.values())))
        self._metrics.remote_encoders.set(len(self._lanes))

    def _ask(self, name: str, channel: Channel) -> None:
        lane = self._lanes.get(name)
        if lane is not None and lane.encoder.gone:
            self._give_up(name, 'it has ended or does not answer')
        asked = self._asked.get(name)
        if asked is None:
            self._asked[name] = asked = _Asked(channel.call('hello'), self._clock())
        if asked.answer.ready(0):
            del self._asked[name]
            try:
                hello: Hello = asked.answer.result()
            except EncoderGoneError as error:
                self._give_up(name, str(error))
            else:
                self._met(channel, hello)
        elif self._clock() - asked.since > SILENCE and name in self._lanes:
            self._give_up(name, f'it has not answered for {SILENCE:g} s')

    def _met(self, channel: Channel, hello: Hello) -> None:
        name, lane = channel.name, self._lanes.get(channel.name)
        if lane is not None and lane.encoder.incarnation != hello.get('incarnation'):
            self._give_up(name, 'it has been restarted')
            lane = None
        if lane is not None:
            return
        in_use = next((one.encoder.hello for one in self._lanes.values()), None)
        refusal = difference(name, hello, self._quest.fingerprint, in_use)
        if refusal is not None:
            if self._refused.get(name) != refusal:
                logger.warning('%s', refusal)
            self._refused[name] = refusal
            return
        self._refused.pop(name, None)
        encoder = RemoteEncoder(channel, hello, self._quest.config)
        lane = self._lanes[name] = Lane(self._work.join(encoder), encoder, self._work)
        lane.start()
        logger.info(
            'encoder %s takes tiles: %s on %s, %s, tile batch %d (%d in use)',
            *(name, hello['device'], hello['host'], hello['dtype'], hello['tile_batch'], len(self._lanes)),
        )
        if not self._ready.done():
            self._ready.set_result(None)

    def _give_up(self, name: str, why: str) -> None:
        lane = self._lanes.pop(name, None)
        if lane is None:
            return
        lane.encoder.gone = True
        self._work.leave(lane.device)
        self._metrics.remote_losses.inc()
        self._ended = [one for one in self._ended if one.alive] + [lane]
        logger.warning('encoder %s is not used any more: %s (%d in use)', name, why, len(self._lanes))

    def _cannot_start(self, why: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(DeviceStartError(self._quest.cluster.name, NoEncoderError(why)))

    def _mind_absence(self) -> None:
        """Count the time without any encoder, and refuse prompts when it has been long."""
        now, quest = self._clock(), self._quest
        if self._lanes:
            self._alone_since = now
        elif now - self._alone_since > quest.seconds:
            self._work.suspend(
                f'No encoder of {quest.cluster.name} has been there for {quest.seconds:g} s. Try again later.'
            )
            if not self._ready.done():
                self._cannot_start(self._nobody())

    def _nobody(self) -> str:
        text = (
            f'no encoder of this checkpoint (fingerprint {self._quest.fingerprint}) is there after '
            f'{self._quest.seconds:g} s. Start some with `lmdeploy-vico encoder --model DIR`.'
        )
        with suppress(Exception):  # a cluster that does not answer is no better explanation
            if others := self._quest.cluster.others():
                text += f' Encoders of other checkpoints are there: {", ".join(others)}.'
        return text
