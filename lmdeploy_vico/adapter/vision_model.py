"""The API-process side: a new-style LMDeploy VisionModel that encodes images before the engine sees the request."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmdeploy.model import BaseChatTemplate
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.model.base import VisionModel

from lmdeploy_vico import __version__
from lmdeploy_vico.adapter.decoding import guard_image_decoding
from lmdeploy_vico.adapter.hf_config import VicoChatConfig
from lmdeploy_vico.adapter.language_model import language_model_shapes
from lmdeploy_vico.adapter.prompt import IMAGE_CONTEXT, assemble, render_chat, render_raw, split_ids
from lmdeploy_vico.adapter.registration import require_all_hooks
from lmdeploy_vico.adapter.requests import image_jobs, prompt_compression
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.log import get_logger
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.stage import EncodedImage, VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.weights import Checkpoint


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, cut where its images stand: text, or token ids of a /generate request."""

    pieces: list[str] | list[list[int]]


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
            UnsupportedCheckpointError, OptionError: the server must not start; the message says why.
        """
        require_all_hooks()
        began = time.perf_counter()
        self.block_size = getattr(backend_config, 'block_size', 64)
        self.options = options = Options.load(getattr(backend_config, 'hf_overrides', None))
        guard_image_decoding()
        checkpoint = Checkpoint(self.model_path)
        checkpoint.require(language_model_shapes(self.hf_config.llm_config, self.hf_config))
        encoder = VisionEncoder.from_pretrained(
            self.model_path,
            device=None if options.vision_device == 'auto' else options.vision_device,
            dtype=self.mm_feature_dtype,
            tile_batch=options.tile_batch or None,
        )
        self.stage = VisionStage(encoder, self.mm_feature_dtype or torch.bfloat16, options.preprocess_threads)
        self._log_start(encoder, time.perf_counter() - began)

    def _log_start(self, encoder: VisionEncoder, seconds: float) -> None:
        config = encoder.config
        get_logger().info(
            'lmdeploy-vico %s serves %s: vision side on %s in %s (tile batch %d, %d preparation threads, loaded '
            'in %.1f s), compression %s (thresholds: quantile %g, score %g), at most %d tiles per image',
            *(__version__, self.model_path, encoder.device, str(encoder.dtype).removeprefix('torch.')),
            *(encoder.tile_batch, self.options.preprocess_threads, seconds, self.options.compression),
            *(config.relative_threshold, config.absolute_threshold, self.options.max_tiles),
        )

    def get_input_prompt(
        self,
        messages: list[dict[str, Any]],
        chat_template: Any,
        tools: list[object] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompt:
        """Render the messages; overrides LMDeploy's, which knows no images (``self`` replaces a static method)."""
        images = len(image_jobs(messages, self.options.max_tiles))
        if self.has_input_ids(messages):
            return Prompt(split_ids(messages[0]['content'][0]['text'], self.image_token_id, images))
        _check_texts(messages)
        if type(chat_template) is BaseChatTemplate and len(messages) == 1:
            text = ''.join(item['text'] for item in messages[0]['content'] if item['type'] == 'text')
            return Prompt(render_raw(text, images))
        kwargs = chat_template_kwargs or {}
        return Prompt(render_chat(messages, lambda flat: chat_template.messages2prompt(flat, tools=tools, **kwargs)))

    def preprocess(
        self,
        messages: list[dict[str, Any]],
        input_prompt: Prompt,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Blocking form of :meth:`preprocess_async`, with the signature by which LMDeploy knows new-style models."""
        return self._assemble(input_prompt, self._submit(messages, mm_processor_kwargs).result())

    async def preprocess_async(
        self,
        messages: list[dict[str, Any]],
        input_prompt: Prompt | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Encode a request's images and build its prompt, without blocking other requests' preparation.

        Returns:
            ``prompt`` (text for the log), ``input_ids`` at their true length, ``multimodal`` (the spans).

        Raises:
            ValueError: the request is at fault; LMDeploy answers 400 with the message.
        """
        images = await asyncio.wrap_future(self._submit(messages, mm_processor_kwargs))
        return await asyncio.to_thread(self._assemble, input_prompt, images)

    def _submit(self, messages: list[dict[str, Any]], mm_processor_kwargs: dict[str, Any] | None) -> Any:
        jobs = image_jobs(messages, self.options.max_tiles)
        return self.stage.submit(jobs, prompt_compression(mm_processor_kwargs, self.options.compression))

    def _assemble(self, prompt: Prompt, images: Sequence[EncodedImage]) -> dict[str, Any]:
        pieces = prompt.pieces
        text = None
        if isinstance(pieces[0], str):
            text = IMAGE_CONTEXT.join(pieces)
            pieces = [self.tokenizer.encode(piece, add_bos=index == 0) for index, piece in enumerate(pieces)]
        input_ids, spans = assemble(pieces, images, self.image_token_id, self.block_size)
        return {'prompt': text, 'input_ids': input_ids, 'multimodal': spans}


def _check_texts(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        for item in message['content'] if isinstance(message['content'], list) else []:
            if item['type'] == 'text' and not isinstance(item.get('text'), str):
                raise ValueError('A content item of type "text" must have a string "text".')


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token, add_bos=False)
    if len(ids) != 1:
        raise UnsupportedCheckpointError(f'The tokenizer does not know {token} as one token.')
    return ids[0]
