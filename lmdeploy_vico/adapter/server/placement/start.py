"""Starts the vision side of a server: reads the options, loads the weights, and says in the log what it does."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lmdeploy.messages import PytorchEngineConfig

from lmdeploy_vico import __version__
from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.lifecycle.state import Lifecycle
from lmdeploy_vico.adapter.server.placement.devices import vision_devices
from lmdeploy_vico.adapter.server.placement.elsewhere import encoders_elsewhere, ray_address
from lmdeploy_vico.adapter.server.placement.language import LanguageEngine
from lmdeploy_vico.adapter.server.placement.replicas import Replicas
from lmdeploy_vico.adapter.server.placement.summary import log_settings
from lmdeploy_vico.adapter.server.synthetic import SyntheticEncoder
from lmdeploy_vico.checkpoints.files import Weights
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.fetch import Fetcher
from lmdeploy_vico.media.loader import Files, MediaLoader
from lmdeploy_vico.media.memory import MemoryBudget
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.media.store import MediaStore
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.remote.fleet import Quest
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.tiling import Tiling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionSide:
    """What a started server prepares requests with.

    Attributes:
        stage: encodes images.
        rules: for requests; the model's context length is not among them, because it is not known yet.
        memory: for what clients send and have decoded.
        loader: loads images and videos.
        max_body_bytes: of a request.
        synthetic: makes visual tokens up; None where that is not allowed.
        media_store: keeps what clients name by ids.
        lifecycle: of the server; None for a pipeline.
        thresholds: of the routing rule, relative and absolute.
        page: whether there is a page at ``/vico``.
    """

    stage: VisionStage
    rules: Rules
    memory: MemoryBudget
    loader: MediaLoader
    max_body_bytes: int
    synthetic: SyntheticEncoder | None
    media_store: MediaStore
    lifecycle: Lifecycle | None
    thresholds: tuple[float, float]
    page: bool


def start_vision_side(model_path: str, language: LanguageEngine) -> VisionSide:
    """Load the vision side of a checkpoint, once for each of its devices, and start the stage.

    Args:
        model_path: the checkpoint.
        language: the engine of its language model.

    Raises:
        UnsupportedCheckpointError, OptionError, UnsupportedSpeedupError: the server must not start; the text says why.
            After these or any other error, no thread is left.
    """
    began = time.perf_counter()
    engine_config = language.config
    options = Options.load(engine_config.hf_overrides)
    use(options.kernels)
    language.require_ranks()
    weights = language.open_weights(model_path, options)
    config = read_config(model_path, engine_config.hf_overrides)
    config = replace(config, max_tiles=min(config.max_tiles, options.max_tiles))
    replicas, quest = _encoders(model_path, weights, config, options, engine_config)
    # A pipeline's own limit on concurrent prompts is enough, and its caller cannot try again later.
    limited = engine_config.enable_mp_engine
    dtype = language.dtype
    with replicas.fitting():
        stage = VisionStage(
            replicas.encoders,
            dtype,
            options.preprocess_threads,
            options.max_queued_tiles if limited else None,
            options.cache_bytes,
            quest,
        )
    try:
        logger.info('lmdeploy-vico %s serves %s', __version__, model_path)
        logger.info('loaded in %.1f s', time.perf_counter() - began)
        log_settings(config, options, replicas.encoders, limited)
        language.report_memory(model_path, replicas.before)
        return VisionSide(
            stage,
            _rules(config, options),
            MemoryBudget(options.max_decoded_bytes if limited else None),
            media_loader(options, limited),
            options.max_body_bytes,
            SyntheticEncoder(config.llm_hidden_size, dtype, options.max_tiles + 1)
            if options.synthetic_images
            else None,
            MediaStore(options.media_store_bytes),
            Lifecycle(options.shutdown_grace, options.exit_on_engine_death) if limited else None,
            (config.relative_threshold, config.absolute_threshold),
            options.page and limited,
        )
    except Exception:
        stage.close()
        raise


def _encoders(
    model_path: str, weights: Weights, config: VicoConfig, options: Options, engine_config: PytorchEngineConfig
) -> tuple[Replicas, Quest | None]:
    """The vision side on devices of this machine, or on none and a quest for encoders elsewhere."""
    address = ray_address(options.vision_device)
    devices = [] if address is not None else vision_devices(options.vision_device, engine_config)
    replicas = Replicas(weights, config, devices, options, graph=not engine_config.eager_mode)
    if address is not None:
        return replicas, encoders_elsewhere(model_path, config, options, address)
    # Loading leaves memory behind. The KV cache is sized by what is free, and what the stage takes from here on stays.
    torch.cuda.empty_cache()
    return replicas, None


def _rules(config: VicoConfig, options: Options) -> Rules:
    return Rules(
        Tiling.of(config),
        options.max_tiles,
        options.compression,
        synthetic=options.synthetic_images,
        media_ids=options.media_store_bytes > 0,
        max_images=options.max_images,
        max_videos=options.max_videos,
        max_prompt_tiles=options.max_prompt_tiles,
        routing_scope=options.routing_scope,
    )


def media_loader(options: Options, serves: bool) -> MediaLoader:
    """What loads images and videos.

    Args:
        options: of the server.
        serves: whether it is one. A pipeline's caller may name any file of this machine, and limits itself.
    """
    decoder = MediaDecoder(
        options.decode_processes,
        options.image_decode_seconds,
        options.video_decode_seconds,
        options.max_decoded_bytes if serves else None,
        eager=serves,
    )
    root = options.allowed_local_media_path
    files = Files(allowed=bool(root), root=Path(root).resolve() if root else None) if serves else Files(allowed=True)
    pictures = PictureOptions(options.upright_images, options.white_background)
    fetcher = Fetcher(options.max_media_bytes, options.fetch_seconds)
    return MediaLoader(decoder, fetcher, files, options.max_media_bytes, pictures)


def read_config(model_path: str, overrides: Mapping[str, Any] | None) -> VicoConfig:
    """Read the checkpoint's config as the engine sees it: with ``--hf-overrides`` applied."""
    config = json.loads((Path(model_path) / 'config.json').read_text())
    return VicoConfig.from_dict(_override(config, overrides or {}))


def _override(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _override(merged[key], value) if both else value
    return merged
