"""The whole ViCO model with gradients: pixels and token ids in, the language model's hidden states out."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL, VicoConfig
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.data.batches import Batch
from lmdeploy_vico.training.model.losses import Target, token_kl
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tiling import TILE_SHAPE

TIED = 'llm_config.tie_word_embeddings: models without a head of their own cannot be trained.'
LANGUAGE_MODELS = ('qwen3', 'qwen3_moe')


class VicoModel(VisionTower):
    """The vision side with a language model under it. Parameters have the checkpoint's names, but for experts.

    ``transformers`` keeps the experts of a layer in one tensor; :mod:`~lmdeploy_vico.training.model.weights` converts.

    Args:
        config: the content of a ViCO checkpoint's ``config.json``.

    Raises:
        TrainingError: the language model is neither a Qwen3 nor a Qwen3-MoE, or has tied embeddings.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(VicoConfig.from_dict(config))
        llm = copy.deepcopy(dict(config['llm_config']))
        kind = llm.pop('model_type', None)
        if kind not in LANGUAGE_MODELS:
            raise TrainingError(f'llm_config.model_type is {kind!r}; {" and ".join(LANGUAGE_MODELS)} can be trained.')
        if llm.get('tie_word_embeddings'):
            raise TrainingError(TIED)
        # Published configs name FlashAttention; without a mask, PyTorch's own takes the same way.
        self.language_model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **llm), attn_implementation='sdpa'
        )

    def forward(self, batch: Batch, target: Target | None = None) -> torch.Tensor:
        """Run the model over a batch.

        Everything that needs gathered parameters is in here, as FSDP gathers them for this call.

        Args:
            batch: on the parameters' device.
            target: what the frozen reference made of the same responses.

        Returns:
            Hidden states ``[N, H]`` at the N positions that predict a response's token; with a target instead, float32
            ``[N]``: the divergence of each token's distribution from the reference's (paper, Eq. 1).
        """
        hidden = self.hidden(batch)
        return hidden if target is None else token_kl(hidden, self.language_model.lm_head.weight, target)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states ``[N, H]`` after the last norm, as :meth:`forward` returns them."""
        embeddings = self.language_model.model.embed_tokens(batch.ids)
        visual, spare = self.visual_tokens(batch.tiles, batch.compressed)
        embeddings = embeddings.clone()
        embeddings[batch.visual] = visual.to(embeddings.dtype)
        # A gradient for every parameter of the vision side, zero if need be: shards are reduced by all processes.
        embeddings = embeddings + spare.to(embeddings.dtype)
        output = self.language_model.model(inputs_embeds=embeddings, use_cache=False)
        states: torch.Tensor = output.last_hidden_state[batch.predicts]
        return states

    def visual_tokens(self, tiles: torch.Tensor, compressed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and project tiles with the projector that each is routed to.

        Args:
            tiles: uint8 ``[T, 448, 448, 3]``; there may be none.
            compressed: bool ``[T]``.

        Returns:
            Visual tokens ``[sum of 64 or 256, H]``, tile by tile; and a zero to which every part has contributed, also
            those that no tile has needed.
        """
        if not len(tiles):
            blank = torch.zeros(1, *TILE_SHAPE, dtype=torch.uint8, device=tiles.device)
            tokens, spare = self.visual_tokens(blank, compressed.new_zeros(1))
            return tokens[:0], spare + 0 * tokens.sum()
        kinds = compressed.tolist()
        number = sum(kinds)
        room = max(1, len(kinds) - number), max(1, number)
        shuffled = self.shuffle(self.patches(tiles), compressed, room)
        full = self.project(shuffled.full, False).split(TOKENS_FULL)
        less = self.project(shuffled.compressed, True).split(TOKENS_COMPRESSED)
        left = iter(full), iter(less)
        tokens = torch.cat([next(left[kind]) for kind in kinds])
        return tokens, 0 * sum(rows.sum() for rows in (*left[0], *left[1], tokens[:0]))


class RouterModel(VisionTower):
    """The vision side, of which the router alone is trained (paper, section 3.2)."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """The router's float32 logits ``[B, 2]`` of uint8 tiles ``[B, 448, 448, 3]``; class 0: compress (Eq. 4)."""
        with torch.no_grad():
            patches = self.patches(tiles)
        with torch.autocast(tiles.device.type, enabled=False):  # the router's activations are float32 wherever it runs
            return self.logits(patches)
