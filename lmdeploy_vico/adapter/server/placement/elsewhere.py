"""Encoders of a Ray cluster in place of devices of this machine: ``vision_device=ray:auto`` or ``ray:HOST:PORT``."""

import logging
import os
from pathlib import Path

from lmdeploy_vico.adapter.server.placement.devices import OPTION
from lmdeploy_vico.checkpoints.fingerprint import vision_fingerprint
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.stage.remote.fleet import Quest

RAY = 'ray:'

logger = logging.getLogger(__name__)


def ray_address(option: str) -> str | None:
    """Return the address of the Ray cluster that ``vision_device`` names; None if it names devices.

    Raises:
        OptionError: there is no address in it.
    """
    if not option.startswith(RAY):
        return None
    address = option.removeprefix(RAY)
    if address != 'auto' and not address.rpartition(':')[2].isdecimal():
        raise OptionError(
            f'vision_device {option!r} is not an address: set it to "ray:auto" or "ray:<host>:<port>".', OPTION
        )
    return address


def encoders_elsewhere(model_path: str, config: VicoConfig, options: Options, address: str) -> Quest:
    """Join a Ray cluster, and return what a stage has to look for in it.

    Args:
        model_path: the server's checkpoint.
        config: the vision side's.
        options: the server's.
        address: of the cluster.

    Raises:
        OptionError: the cluster cannot be joined, or weights that are made up are asked for.
    """
    if options.dummy_weights:
        raise OptionError(
            'dummy_weights are made up in each process: encoders of a Ray cluster need a checkpoint.', 'dummy_weights'
        )
    from lmdeploy_vico.stage.remote.cluster import ClusterError, RayCluster  # loads Ray

    fingerprint = vision_fingerprint(Path(model_path), config)
    try:
        cluster = RayCluster(address, fingerprint)
    except ClusterError as error:
        raise OptionError(f'vision_device {options.vision_device!r}: {error}', OPTION) from error
    if os.environ.get('RAY_AUTH_MODE', '').lower() != 'token':
        logger.warning(
            'the Ray cluster of %s is used without token authentication (RAY_AUTH_MODE=token): whoever reaches it can '
            'run code on all its machines',
            options.vision_device,
        )
    return Quest(cluster, fingerprint, config, options.encoder_seconds)
