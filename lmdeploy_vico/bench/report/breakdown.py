"""Where the time of a request went, from the server's ``/metrics`` before and after."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

SAMPLE = re.compile(r'^([a-zA-Z_:][\w:]*)(\{.*\})?\s+(\S+)')
VICO, LMDEPLOY = 'vico:', 'lmdeploy:'
# From this share of the wall time on, a part counts as busy all the time: there are gaps between its batches.
BUSY = 0.7


def parse_metrics(text: str) -> dict[str, float]:
    """Return the values by name, summed over labels, without buckets."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match and match[1].startswith((VICO, LMDEPLOY)) and not match[1].endswith(('_bucket', '_created')):
            values[match[1]] = values.get(match[1], 0.0) + float(match[3])
    return values


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each value has grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


@dataclass(frozen=True)
class Breakdown:
    """Seconds of a request in each part, adding up to its time to the first token; and how busy two of them were.

    Attributes:
        decode: fetching and decoding, in a thread. Of a server without the plugin: everything before the engine.
        queue: from its arrival in the vision stage to its first tile on the device, without the cutting: waiting for a
            thread, waiting for the device.
        tiling: resizing and cutting, in a thread.
        vit: its share of the time that the device encoded.
        hand_over: all that is not another part: HTTP, waiting for a decoding thread, placing the embeddings, sending
            them to the engine, the way back. Of an engine on a CPU also the wait for its loop, which stands while the
            model computes.
        engine_queue: waiting for the scheduler.
        prefill: from being scheduled to the first token. In LMDeploy's own classes, the ViT is in here.
        vit_busy: share of the wall time in which a device encoded; above 1 with several devices.
        tiling_threads: how many threads were cutting on average.
    """

    decode: float
    queue: float
    tiling: float
    vit: float
    hand_over: float
    engine_queue: float
    prefill: float
    vit_busy: float
    tiling_threads: float

    @classmethod
    def of(cls, added: Mapping[str, float], ttft: float, requests: int, duration: float) -> 'Breakdown | None':
        """Make it of what a cell's rounds added to the metrics; None where the server keeps none.

        Args:
            ttft: mean seconds to the first token, as the client saw it.
        """
        answered = added.get('lmdeploy:time_to_first_token_seconds_count', 0)
        if not answered or not requests:
            return None
        engine = added['lmdeploy:time_to_first_token_seconds_sum'] / answered
        queue = added.get('lmdeploy:request_queue_time_seconds_sum', 0) / answered
        prefill = added.get('lmdeploy:request_prefill_time_seconds_sum', 0) / answered
        seconds = {
            name: added.get(f'vico:encoder_{name}_seconds_sum', 0.0)
            for name in ('decode', 'queue_wait', 'preprocess', 'model_forward')
        }
        decode, tiling, vit = (seconds[name] / requests for name in ('decode', 'preprocess', 'model_forward'))
        waiting = max(0.0, seconds['queue_wait'] / requests - tiling)
        if f'{VICO}encoder_queue_wait_seconds_sum' not in added:
            decode = max(0.0, ttft - engine)
        return cls(
            decode=decode,
            queue=waiting,
            tiling=tiling,
            vit=vit,
            hand_over=max(0.0, ttft - decode - waiting - tiling - vit - queue - prefill),
            engine_queue=queue,
            prefill=prefill,
            vit_busy=seconds['model_forward'] / duration,
            tiling_threads=seconds['preprocess'] / duration,
        )

    def parts(self) -> dict[str, float]:
        """Seconds by part, in the order a request goes through them."""
        names = ('decode', 'queue', 'tiling', 'vit', 'hand_over', 'engine_queue', 'prefill')
        return {name: getattr(self, name) for name in names}

    def bottleneck(self) -> str:
        """What takes most of the wall time, in words: with a fixed number of requests on their way, where they are."""
        parts = self.parts()
        total = sum(parts.values()) or 1.0
        vision = parts['decode'] + parts['queue'] + parts['tiling'] + parts['vit']
        engine = parts['engine_queue'] + parts['prefill']
        if parts['hand_over'] > max(vision, engine):
            share = f'{parts["hand_over"] / total:.0%}'
            return f'HTTP and hand-over (on a CPU: and the wait for a busy engine) take {share} of the time'
        if engine >= vision:
            return f'prefill, with the wait for it, takes {engine / total:.0%} of the time'
        if self.vit_busy >= BUSY:
            return f'the ViT is busy {self.vit_busy:.0%} of the time'
        return (
            f'requests spend {vision / total:.0%} of the time before the engine, where the ViT is busy '
            f'{self.vit_busy:.0%} of it and {self.tiling_threads:.1f} threads cut images: preparation limits'
        )
