"""What each stage of a server takes for a request, and how many requests a second the whole deployment can answer."""

from dataclasses import dataclass

from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.planning import constants
from lmdeploy_vico.planning.deployment import Deployment, Workload
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.language import BYTES

PREPARATION, VISION, HAND_OVER, LANGUAGE_MODEL = 'preparation', 'vision', 'hand-over', 'language model'


@dataclass(frozen=True)
class Stages:
    """The stages of a deployment for requests of one kind; without images, only the language model's takes time."""

    deployment: Deployment
    work: Workload

    @property
    def prepare(self) -> float:
        """Seconds of a core for a request's picture, decoding included."""
        return constants.PREPARE_SECONDS * self.work.tiles / constants.PREPARED_TILES if self.work.images else 0.0

    @property
    def prepare_alone(self) -> float:
        """Seconds of :attr:`prepare` in which no other picture of the server can be prepared."""
        return constants.PREPARE_ALONE * self.prepare

    @property
    def tile_batch(self) -> int:
        """Tiles of a batch of one GPU."""
        return constants.TILE_BATCH[MODELS[self.deployment.model].size.vit_width]

    @property
    def tile(self) -> float:
        """Seconds of a GPU for a tile, in a full batch."""
        rate = constants.TILE_RATES[MODELS[self.deployment.model].size.vit_width]
        return GPUS[constants.TILE_RATES_OF].flops / self.deployment.gpu.flops / rate

    @property
    def batch(self) -> float:
        """Seconds of a GPU for a batch, full or not: batches are padded."""
        return self.tile * self.tile_batch

    @property
    def send(self) -> float:
        """Seconds of the API process's loop to send the visual tokens to the engine."""
        return constants.SEND_SECONDS * self._handed

    @property
    def receive(self) -> float:
        """Seconds of the engine's loop to receive them, and to send them on where there are several ranks."""
        ranks = constants.FORWARD_SECONDS if self.deployment.tp > 1 else 0.0
        return (constants.RECEIVE_SECONDS + ranks) * self._handed

    @property
    def _handed(self) -> float:
        """The visual tokens, in units of what was measured."""
        hidden = MODELS[self.deployment.model].size.hidden
        handed = self.work.visual_tokens * hidden * BYTES / constants.HANDED_BYTES
        return handed if self.work.images else 0.0

    @property
    def prompts(self) -> float:
        """Prompts that a prefill step could take, were there no limit of tokens: on average, at least 1.

        As many as the KV cache holds. GPUs that encode, too, bring no more with a round of batches than it finishes.
        """
        held = float(self.deployment.in_flight(self.work))
        if self.deployment.vision_devices is not None or not self.work.images:
            return held
        return min(held, max(1.0, self.deployment.tp * self.tile_batch / self.work.tiles))

    @property
    def prefill(self) -> float:
        """Seconds of the language model for a prompt, where the queue never empties."""
        limit = self.deployment.max_prefill_tokens
        return self.deployment.language_model.request_seconds(self.work.tokens, limit, self.prompts)

    def seconds(self) -> dict[str, float]:
        """Return, for each stage, the seconds between two requests that the whole deployment lets through."""
        servers, work = self.deployment.dp, self.work
        return {
            PREPARATION: max(self.prepare / self.deployment.cores, self.prepare_alone) / servers,
            VISION: self.tile * work.tiles / self.deployment.encoders if work.images else 0.0,
            HAND_OVER: max(self.send, self.receive) / servers,
            LANGUAGE_MODEL: self.prefill / servers,
        }

    def paces(self) -> dict[str, float]:
        """Return :meth:`seconds`; GPUs that encode and prefill do one at a time: both count as what takes longer."""
        seconds = self.seconds()
        if self.deployment.vision_devices is None:
            longer = max((LANGUAGE_MODEL, VISION), key=lambda stage: seconds[stage])
            seconds[longer] = seconds[LANGUAGE_MODEL] + seconds[VISION]
        return seconds

    @property
    def requests_per_second(self) -> float:
        """Requests/s that the deployment answers at most: those of its slowest stage."""
        return 1 / max(self.paces().values())

    @property
    def bottleneck(self) -> str:
        """The slowest stage."""
        paces = self.paces()
        return max(paces, key=lambda stage: paces[stage])
