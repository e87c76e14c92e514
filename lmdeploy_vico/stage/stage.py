"""VisionStage: prepares the images of many requests in parallel and encodes their tiles in common device batches."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lmdeploy_vico.choices import Compression
from lmdeploy_vico.stage.errors import encoding_error
from lmdeploy_vico.stage.jobs import EncodedImage, ImageJob, routing_groups
from lmdeploy_vico.stage.memory import StageMemory
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import Admission, PendingPrompt, TileQueue
from lmdeploy_vico.stage.remote.fleet import Fleet, Quest
from lmdeploy_vico.stage.remote.work import RemoteWork
from lmdeploy_vico.stage.tiles import TileCache
from lmdeploy_vico.stage.work import Work, fail
from lmdeploy_vico.stage.workers.protocol import DeviceEncoder, Worker
from lmdeploy_vico.stage.workers.thread import DeviceThread
from lmdeploy_vico.vision.resample import pass_order
from lmdeploy_vico.vision.tiling import cut_grid, tile_digests

READ_LOCKS = 16
ALIGNMENT = 16  # bytes, of objects in memory: the low bits of all ids are equal and do not tell pictures apart


class VisionStage:
    """Turns prompts' images into visual tokens.

    A pool of threads cuts images into tiles. Each device has a worker, which fills every batch with tiles of the oldest
    prompts: a large prompt spreads over several batches, and small ones share one. It does not wait for a batch to be
    full. A tile that is cached, or being encoded for another prompt, is not encoded again. A prompt is routed and
    projected when its last tile is encoded, by the scores of its own tiles only.

    An error belongs to the prompt that caused it and is raised from that prompt's future. Cancelling a future takes its
    prompt out of the queue. Tiles on which a device fails are tried once more, on another device if there is one. When
    the last device no longer answers, as after an illegal memory access on a CUDA device, the stage refuses all
    prompts.

    Args:
        encoders: the vision side of the checkpoint, once for each device.
        output_dtype: of the embeddings; the language model's.
        threads: how many cut images.
        capacity: how many tiles may wait; beyond that :meth:`submit` and :meth:`admit` raise StageBusyError. None for
            any number.
        cache_bytes: host memory for the features of tiles that may come again. For CUDA devices that memory is pinned,
            and so is some for tiles in flight. Pinning begins when the devices are ready, in threads of its own.
        quest: for encoders elsewhere, which come and go and take the place of ``encoders``; there are none then.

    Raises:
        DeviceStartError: a device could not be made ready, or no encoder elsewhere is to be found. After this or any
            other error, no thread is left.
    """

    def __init__(
        self,
        encoders: Sequence[DeviceEncoder],
        output_dtype: torch.dtype,
        threads: int,
        capacity: int | None = None,
        cache_bytes: int = 0,
        quest: Quest | None = None,
    ) -> None:
        self._encoders = encoders
        self._metrics = stage_metrics()
        self._queue = TileQueue(capacity, len(encoders))
        self._cache = TileCache(cache_bytes)
        self._memory: StageMemory | None = None
        self._prepare = ThreadPoolExecutor(threads, thread_name_prefix='vico-prepare')
        # Pillow cannot read one file from several threads. Pictures share a few locks, chosen by their ids.
        self._reading = [threading.Lock() for _ in range(READ_LOCKS)]
        self._workers: list[Worker] = []
        try:
            self._prepare.submit(pass_order)  # compiles the resizing: a second or two that no request has to wait
            for worker in self._make_workers(output_dtype, quest):
                worker.start()
                self._workers.append(worker)
            for worker in self._workers:
                worker.wait_until_ready()
            self._lend_memory(output_dtype)
        except Exception:
            self.close()
            raise

    def admit(self, size: int) -> Admission:
        """Hold a place for about ``size`` tiles of a request whose images are not decoded yet.

        Raises:
            StageBusyError: too many tiles are waiting.
        """
        return self._queue.admit(size)

    def release(self, admission: Admission) -> None:
        """Give a place back. Prompts that were submitted with it stay queued."""
        self._queue.release(admission)

    def submit(
        self, jobs: Sequence[ImageJob], compression: Compression, admission: Admission | None = None
    ) -> 'Future[list[EncodedImage]]':
        """Queue the images of one prompt.

        Args:
            jobs: the images, in the prompt's order.
            compression: for the images that have none of their own.
            admission: the place that the request holds; with it the prompt is accepted however many tiles wait.

        Returns:
            A future of the encoded images. It raises EncodingError or torch.OutOfMemoryError if a device fails, and
            whatever Pillow raises for a damaged picture.

        Raises:
            StageBusyError: too many tiles are waiting and the prompt has no admission, or the stage is closed.
        """
        prompt = PendingPrompt(
            images=[None] * len(jobs),
            groups=routing_groups(jobs, compression),
            size=sum(job.grid.tiles for job in jobs),
        )
        if not jobs:
            prompt.future.set_result([])
            return prompt.future
        self._queue.put(prompt, admission)
        try:
            cutting = [self._prepare.submit(self._cut, prompt, index, job) for index, job in enumerate(jobs)]
        except RuntimeError:  # the stage has been closed in the meantime
            prompt.future.cancel()
            return prompt.future
        # Once a prompt has failed or been cancelled, no further image of it is cut.
        prompt.future.add_done_callback(lambda _: [future.cancel() for future in cutting])
        return prompt.future

    def close(self) -> None:
        """Stop the threads and free the memory.

        Batches on a device are finished first; prompts that wait are cancelled.
        """
        self._queue.close()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.join()
        # Only the futures: a variable that held a prompt would hold its tiles and their memory.
        for future in [prompt.future for prompt in self._queue.give_up()]:
            future.cancel()
        for encoder in self._encoders:
            encoder.use_memory(None)
        self._cache.clear()
        if self._memory is not None:
            self._memory.close()

    def _make_workers(self, output_dtype: torch.dtype, quest: Quest | None) -> list[Worker]:
        if quest is not None:
            work = RemoteWork(self._queue, self._cache, output_dtype, quest.config)
            self._work: Work = work
            return [Fleet(quest, work)]
        self._work = Work(self._queue, self._cache, output_dtype)
        return [DeviceThread(index, encoder, self._work) for index, encoder in enumerate(self._encoders)]

    def _lend_memory(self, output_dtype: torch.dtype) -> None:
        # The devices are ready: results of their warming up take none of this memory. The first batch waits for it.
        copying = [encoder for encoder in self._encoders if encoder.copies_results]
        if copying:
            self._memory = self._work.memory = StageMemory(copying, output_dtype, self._cache)
        for encoder in copying:
            encoder.use_memory(self._memory)

    def _cut(self, prompt: PendingPrompt, index: int, job: ImageJob) -> None:
        try:
            with self._reading[id(job.image) // ALIGNMENT % READ_LOCKS]:
                job.image.load()  # does nothing if the pixels have been read already
            with self._metrics.preprocess.time():
                pixels = cut_grid(job.image, job.grid)
                tiles = self._cache.get(tile_digests(pixels, job.salt), pixels)
            given_up = self._queue.cut(prompt, index, tiles)
            if given_up is not None:
                fail(prompt, encoding_error(given_up))
        except Exception as error:
            fail(prompt, error)
