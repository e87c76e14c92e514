"""What LMDeploy 0.18 does with an image, outside its server and engine, for comparison.

Preparation is its own: ``ImageMediaIO`` in the event loop's default pool, then ``InternVLVisionModel.preprocess`` in
the one thread of ``ImageEncoder``; the next images are decoded meanwhile. The vision path is that of its
``InternVLChatModel`` in a prefill: ViT, router, both projectors and the choice between them, and the shortening of the
prompt's embeddings; without flash mode, ViT and projector. As many prompts share a batch as its prefill budget admits.

Left out, in its favour: the language model, scheduling, and pickling the pixels to the engine's process. The visual
tokens stay on the device, where the plugin's stage brings them to the host.
"""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lmdeploy.pytorch.model_inputs import BuildModelContext
from lmdeploy.pytorch.models import internvl, patch
from lmdeploy.vl.media.image import ImageMediaIO
from lmdeploy.vl.model.internvl import InternVLVisionModel
from PIL import Image
from torch import nn

from lmdeploy_vico.config import TOKENS_FULL

PREFILL_TOKENS = 8192  # LMDeploy's max_prefill_token_num
TEXT_TOKENS = 64
TEXT_ID, IMAGE_ID = 0, 1


class Preparation:
    """From an image file to normalised pixels, as in LMDeploy's API process."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        self.model = InternVLVisionModel.__new__(InternVLVisionModel)  # without its tokenizer
        self.model.model_path, self.model.image_token_id, self.model.mm_feature_dtype = '', IMAGE_ID, dtype
        self.model.hf_config = namespace(config)
        self.model.build_preprocessor()
        self.media_io = ImageMediaIO()
        self.executor = ThreadPoolExecutor(max_workers=1)  # as in lmdeploy.vl.engine.ImageEncoder

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Normalised float32 pixels ``[tiles, 3, 448, 448]``."""
        return self.model.processor(image, {})

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The same through LMDeploy's whole function, in the model's dtype."""
        messages = [{'role': 'user', 'content': [{'type': 'image', 'data': image}]}]
        return self.model.preprocess(messages)[-1]['content'][0]['pixel_values']

    async def __call__(self, data: bytes) -> torch.Tensor:
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(None, self.media_io.load_bytes, data)
        return await loop.run_in_executor(self.executor, self.preprocess, image)


class _NoLanguageModel(nn.Module):
    """Stands where the language model would: only the embeddings of a prompt's tokens are asked of it."""

    lm_head = None

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(2, width, dtype=dtype, device=device)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def load_weights(self, weights: Iterable[Any]) -> None:
        assert not list(weights)


def build_model(
    config: dict[str, Any], weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> internvl.InternVLChatModel:
    """LMDeploy's module without its language model.

    Args:
        config: the checkpoint's.
        weights: the vision side's tensors by their names in the checkpoint.
        device, dtype: where and in what the module runs.
    """
    if device.type == 'cpu':
        from lmdeploy_vico.cpu import engine

        engine.install()
    language_model = _NoLanguageModel(config['llm_config']['hidden_size'], dtype, device)
    context = SimpleNamespace(q_seqlens=None)
    contexts = SimpleNamespace(current_context=lambda: context)
    with (
        mock.patch.object(internvl, 'build_model_from_hf_config', return_value=language_model),
        patch.build_model_context(BuildModelContext()),
        torch.device(device),
    ):
        model = internvl.InternVLChatModel(namespace(config), contexts, dtype=dtype, device=device)
    names = dict(model.named_parameters())
    model.load_weights((name, value) for name, value in weights.items() if name in names)
    for module in model.modules():
        if hasattr(module, 'update_weights'):
            module.update_weights()
    return model.requires_grad_(False).eval()


class VisionPath:
    """From pixels to visual tokens, as in LMDeploy's engine; without ``flash`` every tile becomes 256 tokens."""

    def __init__(self, model: internvl.InternVLChatModel, flash: bool) -> None:
        self.model, self.flash = model, flash
        self.device = model.mlp1[1].weight.device
        self.executor = ThreadPoolExecutor(max_workers=1)
        self._waiting: list[tuple[torch.Tensor, asyncio.Future[None]]] = []
        self._running = False

    @torch.inference_mode()
    def encode(self, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Visual tokens ``[n, H]`` of prompts of one image each, as pixels ``[tiles, 3, 448, 448]`` on the host."""
        pixels = torch.cat([pixels.to(self.device, non_blocking=True) for pixels in prompts])
        if not self.flash:
            tokens = self.model.extract_feature(pixels).flatten(0, 1)
        else:
            texts = [[TEXT_ID] * TEXT_TOKENS + [IMAGE_ID] * TOKENS_FULL * len(prompt) for prompt in prompts]
            lengths = torch.tensor([len(text) for text in texts], device=self.device)
            self.model.ctx_mgr.current_context().q_seqlens = lengths
            ids = torch.tensor([[token for text in texts for token in text]], device=self.device)
            tokens = self.model.extract_and_compress(pixels, ids, IMAGE_ID)[0]
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return tokens

    def encode_all(self, prompts: Sequence[torch.Tensor]) -> None:
        """Encode prompts in batches of LMDeploy's size."""
        batch: list[torch.Tensor] = []
        for prompt in prompts:
            if batch and not self._fits([*batch, prompt]):
                self.encode(batch)
                batch = []
            batch.append(prompt)
        self.encode(batch)

    @staticmethod
    def _fits(prompts: Sequence[torch.Tensor]) -> bool:
        return sum(len(prompt) * TOKENS_FULL + TEXT_TOKENS for prompt in prompts) <= PREFILL_TOKENS

    async def __call__(self, pixels: torch.Tensor) -> None:
        """Encode one prompt together with those that wait at the same time."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._waiting.append((pixels, done))
        if not self._running:
            self._running = True
            while self._waiting:
                batch = [self._waiting.pop(0)]
                while self._waiting and self._fits([part for part, _ in [*batch, self._waiting[0]]]):
                    batch.append(self._waiting.pop(0))
                await loop.run_in_executor(self.executor, self.encode, [part for part, _ in batch])
                for _, future in batch:
                    future.set_result(None)
            self._running = False
        await done


def namespace(value: Any) -> Any:
    """A config as an object with attributes."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: namespace(part) for key, part in value.items()})
    return value
