"""The API-process side: a new-style LMDeploy VisionModel that encodes images before the engine sees the request."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmdeploy.model import BaseChatTemplate
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.model.base import VisionModel

from lmdeploy_vico import __version__
from lmdeploy_vico.adapter.hf_config import VicoChatConfig
from lmdeploy_vico.adapter.server.admission import admitted, current_admission, estimate_tiles
from lmdeploy_vico.adapter.server.disconnect import watch_clients
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.pixels import PixelBudget
from lmdeploy_vico.adapter.server.placement.devices import vision_devices
from lmdeploy_vico.adapter.server.placement.kv_memory import report_kv_cache
from lmdeploy_vico.adapter.server.placement.precision import engine_dtype
from lmdeploy_vico.adapter.server.placement.replicas import Replicas
from lmdeploy_vico.adapter.server.placement.weights import open_weights
from lmdeploy_vico.adapter.server.prompt import IMAGE_CONTEXT, assemble, check_ids, render_chat, render_raw, split_ids
from lmdeploy_vico.adapter.server.requests import check_texts, media_jobs, prompt_compression
from lmdeploy_vico.adapter.server.synthetic import SyntheticEncoder, are_synthetic
from lmdeploy_vico.adapter.server.usage import count_image_tokens
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL, UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.log import get_logger
from lmdeploy_vico.options import Options
from lmdeploy_vico.patching import Trigger, register
from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.stage.stage import EncodedImage, EncodingError, ImageJob, VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.routing import Compression

ASSEMBLY_THREADS = 2  # tokenizing and copying, a few milliseconds a prompt


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, cut where its images stand: text, or token ids of a /generate request; and those images."""

    pieces: list[str] | list[list[int]]
    jobs: list[ImageJob]


class VicoVisionModel(VisionModel):
    """Serves ViCO checkpoints: images are tiled, encoded and routed here, in the API process.

    LMDeploy's scheduler, KV cache and usage then see the prompt's true, short length.
    """

    _arch = 'InternVLChatModel'

    @classmethod
    def match(cls, config: Any) -> bool:
        """Only configs that our own loader made, which are those of ViCO checkpoints."""
        return isinstance(config, VicoChatConfig)

    def build_preprocessor(self, trust_remote_code: bool = False) -> None:
        """Load what LMDeploy asks for at this point: the tokenizer. The weights follow in :meth:`start`."""
        if self.with_llm:
            raise UnsupportedCheckpointError('Quantising a ViCO checkpoint is not supported.')
        self.tokenizer = Tokenizer(self.model_path, trust_remote_code=trust_remote_code)
        self.image_token_id = _token_id(self.tokenizer, IMAGE_CONTEXT)

    def start(self, backend_config: Any) -> None:
        """Load the vision side; called once, when LMDeploy has chosen the data type and the engine's config.

        Raises:
            PatchError, UnsupportedCheckpointError, OptionError, UnsupportedSpeedupError: the server must not start; the
                message says why.
        """
        register.require_all()
        register.apply(Trigger.MODEL)
        get_logger()  # which implementation of the kernels runs is logged below, by a room that knows no handlers
        began = time.perf_counter()
        self.backend_config = backend_config
        self.options = options = Options.load(backend_config.hf_overrides)
        use(options.kernels)
        watch_clients()
        weights = open_weights(self.model_path, self.hf_config, backend_config, options)
        config = read_config(self.model_path, backend_config.hf_overrides)
        replicas = Replicas(
            weights,
            replace(config, max_tiles=min(config.max_tiles, options.max_tiles)),
            vision_devices(options.vision_device, backend_config),
            options,
            graph=not backend_config.eager_mode,
        )
        torch.cuda.empty_cache()  # of loading; what the stage takes is kept, and the KV cache is sized by what is free
        # A pipeline's own limit on concurrent prompts is enough, and its caller cannot try again later.
        capacity = options.max_queued_tiles if backend_config.enable_mp_engine else None
        self._pixels = PixelBudget(None if capacity is None else options.max_decoded_bytes)
        dtype = engine_dtype(self.hf_config, backend_config)
        with replicas.fitting():
            self.stage = VisionStage(
                replicas.encoders, dtype, options.preprocess_threads, capacity, options.cache_bytes
            )
        self._synthetic = (
            SyntheticEncoder(config.llm_hidden_size, dtype, options.max_tiles + 1) if options.synthetic_images else None
        )
        # Of its own, since in the loop's default pool finished prompts would wait behind other requests' decoding.
        self._assembling = ThreadPoolExecutor(ASSEMBLY_THREADS, thread_name_prefix='vico-assemble')
        self._log_start(replicas.encoders, capacity, time.perf_counter() - began)
        report_kv_cache(self.model_path, self.hf_config, backend_config, replicas.before)

    def close(self) -> None:
        """Stop the threads and let go of the vision side's memory."""
        self.stage.close()
        self._assembling.shutdown()
        del self.stage

    def _log_start(self, encoders: Sequence[VisionEncoder], capacity: int | None, seconds: float) -> None:
        encoder, options, logger = encoders[0], self.options, get_logger()
        config = encoder.config
        logger.info('lmdeploy-vico %s serves %s', __version__, self.model_path)
        logger.info(
            'vision side on %s in %s (tile batch %d, loaded in %.1f s)',
            *(_where(encoders), str(encoder.dtype).removeprefix('torch.'), encoder.tile_batch, seconds),
        )
        logger.info(
            'preparation by %d threads, %s tiles queued at most, %s decoded images, cache of %.1f GiB',
            options.preprocess_threads,
            'any number of' if capacity is None else capacity,
            'any number of' if capacity is None else f'{options.max_decoded_bytes / 2**30:.1f} GiB of',
            options.cache_bytes / 2**30,
        )
        logger.info(
            'compression %s (thresholds: quantile %g, score %g), at most %d tiles per image',
            *(options.compression, config.relative_threshold, config.absolute_threshold, options.max_tiles),
        )

    def get_input_prompt(
        self,
        messages: list[dict[str, Any]],
        chat_template: Any,
        tools: list[object] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompt:
        """Render the messages; overrides LMDeploy's, which knows no images (``self`` replaces a static method)."""
        jobs, videos = media_jobs(messages, self.options.max_tiles, self.options.synthetic_images)
        if videos and _is_raw(chat_template):
            raise ValueError('Videos are accepted in chat messages only, not in raw prompts.')
        ids = _generate_ids(messages, chat_template)
        if ids is not None:
            self.check_ids(ids)
            return Prompt(split_ids(ids, self.image_token_id, len(jobs)), jobs)
        check_texts(messages)
        if _is_raw(chat_template) and len(messages) == 1:
            text = ''.join(item['text'] for item in messages[0]['content'] if item['type'] == 'text')
            return Prompt(render_raw(text, len(jobs)), jobs)
        render = partial(chat_template.messages2prompt, tools=tools, **(chat_template_kwargs or {}))
        return Prompt(render_chat(messages, render, videos), jobs)

    def session_len(self) -> int | None:
        """The model context length, which LMDeploy fills in after the start."""
        return self.backend_config.session_len

    def check_ids(self, ids: Sequence[Any]) -> None:
        """Raise ValueError unless a client's ``ids`` are in the language model's vocabulary."""
        check_ids(ids, self.hf_config.llm_config.vocab_size)

    def preprocess(
        self,
        messages: list[dict[str, Any]],
        input_prompt: Prompt,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Blocking form of :meth:`preprocess_async`, with the signature by which LMDeploy knows new-style models."""
        return self._assemble(input_prompt, self._submit(input_prompt, mm_processor_kwargs).result())

    async def preprocess_async(
        self,
        messages: list[dict[str, Any]],
        input_prompt: Prompt,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Encode a request's images and build its prompt, without blocking other requests' preparation.

        Returns:
            ``prompt`` (text for the log), ``input_ids`` at their true length, ``multimodal`` (the spans).

        Raises:
            ValueError: the request is at fault; LMDeploy answers 400 with the message.
            OverloadError: too much is being encoded already; LMDeploy answers 503.
            RequestError: the vision side failed; LMDeploy answers 500.
        """
        try:
            images = await asyncio.wrap_future(self._submit(input_prompt, mm_processor_kwargs))
        except StageBusyError as error:
            raise OverloadError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise OverloadError('Out of memory while encoding the images. Try again later, or with fewer.') from error
        except EncodingError as error:
            raise RequestError(ErrorCode.INTERNAL_ERROR, str(error)) from error
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._assembling, self._assemble, input_prompt, images)
        count_image_tokens(prompt['multimodal'])
        return prompt

    def admit(
        self, messages: Sequence[Any], media_io_kwargs: Mapping[str, Any] | None
    ) -> AbstractAsyncContextManager[None]:
        """Hold a place for a request whose images are to be decoded inside.

        Raises:
            ValueError: it has more images and videos than fit the session, whatever they show.
            OverloadError: too much is waiting already.
        """
        config, limit = self.stage.encoder.config, self.session_len()
        least, most = estimate_tiles(
            messages, media_io_kwargs, config.max_tiles + config.use_thumbnail, self.options.max_tiles, limit
        )
        self._refuse_too_many(least * TOKENS_COMPRESSED)
        # A place is not held for more than could be answered.
        most = most if limit is None else min(most, limit // TOKENS_COMPRESSED + 1)
        return admitted(self.stage, most, self._pixels)

    def _submit(self, prompt: Prompt, mm_processor_kwargs: dict[str, Any] | None) -> Any:
        compression = prompt_compression(mm_processor_kwargs, self.options.compression)
        if self._synthetic is not None and are_synthetic(prompt.jobs):
            return self._synthetic.submit(prompt.jobs)
        self._refuse_what_cannot_fit(prompt.jobs, compression)
        return self.stage.submit(prompt.jobs, compression, current_admission())

    def _refuse_what_cannot_fit(self, jobs: Sequence[ImageJob], compression: Compression) -> None:
        """Refuse a prompt before any encoding if even its images alone, fully compressed, exceed the session."""
        least = 0
        for job in jobs:
            wanted = compression if job.compression is None else job.compression
            tiles = self.stage.encoder.tile_count(job.image.size, job.max_tiles)
            least += tiles * (TOKENS_FULL if wanted in ('none', 0.0) else TOKENS_COMPRESSED)
        self._refuse_too_many(least)

    def _refuse_too_many(self, least: int) -> None:
        limit = self.session_len()
        if limit is not None and least >= limit:
            raise ValueError(
                f'The images and video frames have at least {least} visual tokens, more than the model context length '
                f'({limit}) allows. Send fewer or smaller ones, or serve with a larger --session-len.'
            )

    def _assemble(self, prompt: Prompt, images: Sequence[EncodedImage]) -> dict[str, Any]:
        pieces = prompt.pieces
        text = None
        if isinstance(pieces[0], str):
            text = IMAGE_CONTEXT.join(pieces)
            pieces = [self.tokenizer.encode(piece, add_bos=index == 0) for index, piece in enumerate(pieces)]
        input_ids, spans = assemble(pieces, images, self.image_token_id, self.backend_config.block_size)
        return {'prompt': text, 'input_ids': input_ids, 'multimodal': spans}


def _is_raw(chat_template: Any) -> bool:
    return type(chat_template) is BaseChatTemplate  # what LMDeploy passes for /generate


def _generate_ids(messages: Sequence[Mapping[str, Any]], chat_template: Any) -> list[Any] | None:
    """The token ids of a /generate request, which arrive as the "text" of its only message.

    A chat message whose text is a list is a client's mistake, and must not be taken for ids.
    """
    first = messages[0]['content'][0] if _is_raw(chat_template) and isinstance(messages[0]['content'], list) else {}
    ids = first.get('text') if first.get('type') == 'text' else None
    return ids if isinstance(ids, list) else None


def _where(encoders: Sequence[VisionEncoder]) -> str:
    """The devices, each with what the vision side takes of it, or together those of which it takes the same."""
    devices: dict[str, list[str]] = {}
    for encoder in encoders:
        devices.setdefault(encoder.memory(), []).append(str(encoder.device))
    return ', '.join(
        f'{", ".join(names)} ({memory}{" each" if len(names) > 1 else ""})' for memory, names in devices.items()
    )


def read_config(model_path: str, overrides: Mapping[str, Any] | None) -> VicoConfig:
    """The checkpoint's config as the engine sees it: with ``--hf-overrides`` applied."""
    config = json.loads((Path(model_path) / 'config.json').read_text())
    return VicoConfig.from_dict(_override(config, overrides or {}))


def _override(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _override(merged[key], value) if both else value
    return merged


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token, add_bos=False)
    if len(ids) != 1:
        raise UnsupportedCheckpointError(f'The tokenizer does not know {token} as one token.')
    return ids[0]
