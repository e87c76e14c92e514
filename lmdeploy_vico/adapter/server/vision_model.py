"""The VisionModel of ViCO checkpoints: how LMDeploy calls the vision side, from a request to its prompt."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.model.base import VisionModel

from lmdeploy_vico.adapter.hf_config import VicoChatConfig
from lmdeploy_vico.adapter.server.body import Bounds
from lmdeploy_vico.adapter.server.disconnect import watch_clients
from lmdeploy_vico.adapter.server.forms.texts import TextBound, in_thread
from lmdeploy_vico.adapter.server.items import parse_media_io_kwargs
from lmdeploy_vico.adapter.server.lifecycle.state import set_lifecycle
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.page.routes import offer_page
from lmdeploy_vico.adapter.server.placement.start import start_vision_side
from lmdeploy_vico.adapter.server.pressure.effect import pressed_tiles
from lmdeploy_vico.adapter.server.pressure.valve import Valve
from lmdeploy_vico.adapter.server.prompt import IMAGE_CONTEXT, Ids, check_ids, cut_at_images
from lmdeploy_vico.adapter.server.request import VicoRequest, parse_processor_kwargs, parse_request, require_text
from lmdeploy_vico.adapter.server.served import ServedRequest, admitted, served_request
from lmdeploy_vico.adapter.server.synthetic import under_pressure
from lmdeploy_vico.adapter.server.turbomind.choice import language_engine
from lmdeploy_vico.adapter.server.usage import count_tiles
from lmdeploy_vico.choices import Compression, Pressed
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.media.store import MediaStore
from lmdeploy_vico.patching import Trigger, register
from lmdeploy_vico.stage.errors import EncodingError
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.wording import shown

T = TypeVar('T')
ASSEMBLY_THREADS = 2  # tokenizing and copying, a few milliseconds a prompt


class VicoVisionModel(VisionModel):
    """Serves ViCO checkpoints: images are tiled, encoded and routed here, in the API process.

    LMDeploy's scheduler, KV cache and usage then see the prompt's true, short length. For each request LMDeploy calls
    :meth:`parse` and :meth:`admit`, decodes its images with our MediaParser, and calls :meth:`get_input_prompt` and
    :meth:`preprocess_async`. What it passes on as "messages" is our :class:`VicoRequest`.
    """

    _arch = 'InternVLChatModel'
    # On TurboMind, LMDeploy would otherwise build a vision side in Python, and turn prefix caching off for texts, too.
    _turbomind_native_vision = True
    media_store: MediaStore | None = None  # until the start
    valve: Valve | None = None  # only where an option asks for one
    allowed_media_domains: list[str] | None = None  # those of --allowed-media-domains; None for all

    @classmethod
    def match(cls, config: Any) -> bool:
        """Return whether the config is one that our own loader made, which are those of ViCO checkpoints."""
        return isinstance(config, VicoChatConfig)

    @classmethod
    def of(cls, owner: Any) -> 'VicoVisionModel | None':
        """The VisionModel of LMDeploy's engine or prompt processor, if it is one of ours."""
        model = getattr(getattr(owner, 'vl_encoder', None), 'model', None)
        return model if isinstance(model, cls) else None

    def build_preprocessor(self, trust_remote_code: bool = False) -> None:
        """Load what LMDeploy asks for at this point: the tokenizer. The weights follow in :meth:`start`."""
        if self.with_llm:
            raise UnsupportedCheckpointError('Quantising a ViCO checkpoint is not supported.')
        self.tokenizer = Tokenizer(self.model_path, trust_remote_code=trust_remote_code)
        self.image_token_id = _token_id(self.tokenizer, IMAGE_CONTEXT)
        self._texts = TextBound(self.tokenizer.model.model.get_vocab())

    def start(self, backend_config: Any) -> None:
        """Load the vision side; called once, when LMDeploy has chosen the data type and the engine's config.

        Raises:
            PatchError, UnsupportedCheckpointError, OptionError, UnsupportedSpeedupError: the server must not start; the
                text says why.
        """
        register.require_all()
        register.apply(Trigger.MODEL)
        self.backend_config = backend_config
        self.language = language_engine(self.hf_config, backend_config)
        side = start_vision_side(self.model_path, self.language)
        self.stage, self.rules, self.loader, self._synthetic = side.stage, side.rules, side.loader, side.synthetic
        self._memory, self.media_store, self.thresholds = side.memory, side.media_store, side.thresholds
        watch_clients(Bounds(side.memory, side.max_body_bytes))
        set_lifecycle(side.lifecycle)
        if side.page:
            offer_page(self)
        # Not the loop's default pool, where finished prompts would wait behind other requests' decoding.
        self._assembling = ThreadPoolExecutor(ASSEMBLY_THREADS, thread_name_prefix='vico-assemble')

    def close(self) -> None:
        """Stop the threads and let go of the vision side's memory."""
        self.loader.close()
        self.stage.close()
        self._assembling.shutdown()
        del self.stage

    def parse(
        self,
        prompt: Any,
        media_io_kwargs: Mapping[str, Any] | None,
        mm_processor_kwargs: Mapping[str, Any] | None,
        raw: bool = False,
    ) -> VicoRequest | None:
        """Check what a client sent, before anything is fetched, decoded or tokenized.

        Args:
            prompt: messages, or a text; None for token ids.
            media_io_kwargs, mm_processor_kwargs: the request's.
            raw: whether no chat template is used.

        Returns:
            The request; None for a text or ids, which have no images.

        Raises:
            ValueError: the request is at fault; LMDeploy answers 400 with the text.
        """
        # LMDeploy fills the context length in after the start.
        rules = replace(self.rules, session_len=self.backend_config.session_len)
        if isinstance(prompt, list):
            served = served_request()
            salt = served.cache_salt if served else ''
            rules = replace(rules, compression=self._compression(served))
            request = parse_request(prompt, media_io_kwargs, mm_processor_kwargs, rules, raw=raw, salt=salt)
            self._texts.require_room(request.characters, rules.session_len)
            return request
        parse_media_io_kwargs(media_io_kwargs)
        parse_processor_kwargs(mm_processor_kwargs, rules)
        if isinstance(prompt, str):
            require_text(prompt)
            self._texts.require_room(len(prompt), rules.session_len)
        elif prompt is not None:
            raise ValueError(f'A prompt must be a text or a list of messages, not {shown(prompt)}.')
        return None

    def _compression(self, served: ServedRequest | None) -> Compression:
        """That of requests that do not say: the server's, and more of it under pressure.

        It is decided once for a request, whose choices (``n``) share it.
        """
        compression = self.rules.compression
        if self.valve is None or served is None:
            return compression
        if served.extra_share is None:
            served.extra_share = self.valve.decide()
        return Pressed(compression, served.extra_share) if served.extra_share else compression

    @asynccontextmanager
    async def admit(self, request: VicoRequest) -> AsyncIterator[None]:
        """Hold a place for a request while its images are decoded and encoded inside.

        Raises:
            ValueError: the request is too large; LMDeploy answers 400 with the text.
            OverloadError: too much is waiting already; LMDeploy answers 503.
        """
        async with admitted(self.stage, request.most_tiles(), self._memory):
            yield

    def get_input_prompt(
        self,
        messages: VicoRequest,
        chat_template: Any,
        tools: list[object] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[str] | list[Ids]:
        """Render a decoded request; overrides LMDeploy's static method, which knows no images.

        Returns:
            The prompt, cut where its images stand; see :func:`cut_at_images`.
        """
        render = partial(chat_template.messages2prompt, tools=tools, **(chat_template_kwargs or {}))
        vocab_size = self.hf_config.llm_config.vocab_size
        return cut_at_images(messages, chat_template, render, self.image_token_id, vocab_size)

    async def in_thread(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function that tokenizes, and never waits, where it holds up no other request."""
        return await in_thread(self._assembling, start)

    def check_ids(self, ids: Sequence[Any]) -> None:
        """Raise ValueError unless a client's ``ids`` are in the language model's vocabulary."""
        check_ids(ids, self.hf_config.llm_config.vocab_size)

    def preprocess(
        self,
        messages: VicoRequest,
        input_prompt: list[str] | list[Ids],
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Blocking form of :meth:`preprocess_async`, with the signature by which LMDeploy knows new-style models."""
        return self._assemble(messages, input_prompt, self._submit(messages).result())[0]

    async def preprocess_async(
        self,
        messages: VicoRequest,
        input_prompt: list[str] | list[Ids],
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Encode a request's images and build its prompt, without blocking other requests' preparation.

        Args:
            messages: the request, decoded.
            input_prompt: the pieces that :meth:`get_input_prompt` returned.
            mm_processor_kwargs: not used; the request has been parsed.

        Returns:
            ``prompt`` (text for the log), ``input_ids`` at their true length, ``multimodal`` (the visual tokens).

        Raises:
            OverloadError: too much is being encoded already; LMDeploy answers 503.
            RequestError: the vision side failed; LMDeploy answers 500.
        """
        try:
            images = await asyncio.wrap_future(self._submit(messages))
        except StageBusyError as error:
            raise OverloadError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise OverloadError('Out of memory while encoding the images. Try again later, or with fewer.') from error
        except EncodingError as error:
            raise RequestError(ErrorCode.INTERNAL_ERROR, str(error)) from error
        loop = asyncio.get_running_loop()
        prompt, pressed = await loop.run_in_executor(self._assembling, self._assemble, messages, input_prompt, images)
        if pressed:
            stage_metrics().pressed_prompts.inc()
            stage_metrics().pressed_tiles.inc(pressed)
        count_tiles(images, pressed)
        return prompt

    def _submit(self, request: VicoRequest) -> 'Future[list[EncodedImage]]':
        if self._synthetic is not None and request.synthetic:
            return self._synthetic.submit([under_pressure(one, request.compression) for one in request.synthetic])
        served = served_request()
        return self.stage.submit(request.pictures, request.compression, served.admission if served else None)

    def _assemble(
        self, request: VicoRequest, pieces: list[str] | list[Ids], images: Sequence[EncodedImage]
    ) -> tuple[dict[str, Any], int]:
        """The prompt, and how many of its tiles are compressed because of pressure: what takes time of a thread."""
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encoded = [self.tokenizer.encode(text, add_bos=index == 0) for index, text in enumerate(texts)]
        of_ids = [piece for piece in pieces if not isinstance(piece, str)]
        input_ids, visual = self.language.assemble(encoded or of_ids, images, self.image_token_id)
        text = IMAGE_CONTEXT.join(texts) if texts else None
        pressed = pressed_tiles(request, images, self.thresholds)
        return {'prompt': text, 'input_ids': input_ids, 'multimodal': visual}, pressed


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token, add_bos=False)
    if len(ids) != 1:
        raise UnsupportedCheckpointError(f'The tokenizer does not know {token} as one token.')
    return ids[0]
