"""The devices that LMDeploy's engine will use, and those of the vision side.

Functions import LMDeploy's engine. The module is loaded together with LMDeploy's vision models, also in processes that
serve another model and never load the engine.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lmdeploy.messages import PytorchEngineConfig

from lmdeploy_vico.options import PREFIX, OptionError

if TYPE_CHECKING:
    from lmdeploy.pytorch.config import DistConfig

AUTO = 'auto'
OPTION = 'vision_device'
SETTING = f'{PREFIX}VISION_DEVICE=cuda:0,cuda:1'


class UnknownDevicesError(OptionError):
    """The engine's devices are not known before it starts, or are on another machine; the message says why."""


def vision_devices(option: str, engine: PytorchEngineConfig) -> list[torch.device]:
    """Return the devices of the vision side.

    Args:
        option: ``vision_device``: names of devices, or "auto" for the engine's.
        engine: LMDeploy's config.

    Raises:
        OptionError: a device does not exist or is named twice, devices are of different kinds, or the engine's devices
            are not known.
    """
    if option != AUTO:
        devices = [_named(name.strip()) for name in option.split(',')]
    else:
        try:
            devices = engine_devices(engine)
        except UnknownDevicesError as error:
            raise OptionError(
                f'vision_device "auto" means the devices of the engine, and {error}: set vision_device to devices of '
                f'this machine, all of one kind, for example {SETTING}.',
                OPTION,
            ) from error
    _require_one_kind(option, devices)
    if len(set(devices)) < len(devices):
        raise OptionError(f'vision_device {option!r} names a device twice.', OPTION)
    return devices


def engine_devices(engine: PytorchEngineConfig) -> list[torch.device]:
    """Return the devices that the engine of this server uses, rank by rank: the CPU where there are no CUDA devices.

    With ``--dp`` LMDeploy starts a server for each rank, which sees its own devices only (``launch_server.py``). Both
    executors number these from 0: "mp" by the worker's number, and "ray", in a Ray cluster of LMDeploy's own, by
    placing one worker after the other.

    Raises:
        UnknownDevicesError: there are more ranks than devices, or a Ray cluster decides where the ranks are.
    """
    if not torch.cuda.is_available():
        return [torch.device('cpu')]
    dist = parallelism(engine)
    if (cluster := joined_cluster(engine, dist)) is not None:
        raise UnknownDevicesError(f'the engine is going to run where the Ray cluster at {cluster} has room for it')
    ranks, here = dist.attn_tp, torch.cuda.device_count()
    if ranks > here:
        raise UnknownDevicesError(f'the engine needs {ranks} devices, of which this machine has {here}')
    if ranks == 1:
        # In a process of its own the engine is on the first device, in this one on what the program has chosen.
        first = _uses_ray(engine, dist) or engine.enable_mp_engine
        return [torch.device('cuda', 0 if first else torch.cuda.current_device())]
    return [torch.device('cuda', index) for index in range(ranks)]


def parallelism(engine: PytorchEngineConfig) -> 'DistConfig':
    """Return how LMDeploy splits the language model; ``attn_tp`` is the number of devices of one server."""
    from lmdeploy.pytorch.config import DistConfig

    if engine.tp == engine.ep == 1:  # LMDeploy ignores dp then
        engine = dataclasses.replace(engine, dp=1, dp_rank=0)
    return DistConfig.from_engine_config(engine)


def joined_cluster(engine: PytorchEngineConfig, dist: 'DistConfig') -> str | None:
    """Return the address of the Ray cluster that places the ranks; None if all of them run on this machine."""
    return _running_ray_cluster(engine) if _uses_ray(engine, dist) else None


def _uses_ray(engine: PytorchEngineConfig, dist: 'DistConfig') -> bool:
    from lmdeploy.pytorch.engine.executor import get_distributed_executor_backend

    executor = engine.distributed_executor_backend or get_distributed_executor_backend(
        dist.world_size, dist.dp, engine.device_type
    )
    in_ray_actor = engine.enable_mp_engine and engine.mp_engine_backend == 'ray'
    return executor == 'ray' or in_ray_actor


def _running_ray_cluster(engine: PytorchEngineConfig) -> str | None:
    """Return the address of the Ray cluster that the engine will join; None if LMDeploy will start its own.

    LMDeploy calls ``ray.init`` without an address. Ray then takes RAY_ADDRESS, or the cluster of an earlier
    ``ray start``.
    """
    from ray._private import services

    if has_joined(engine):
        return str(sys.modules['ray'].get_runtime_context().gcs_address)
    try:
        address: str | None = services.get_ray_address_from_environment(None, None)  # type: ignore[arg-type]
    except ConnectionError as error:
        raise OptionError(f'The engine is to join a Ray cluster that runs here (RAY_ADDRESS): {error}') from error
    return None if address == 'local' else address


def has_joined(engine: PytorchEngineConfig) -> bool:
    """Return whether the process in which the engine will ask Ray for its ranks is this one, and in a cluster."""
    ray = sys.modules.get('ray')
    same_process = not engine.enable_mp_engine or engine.mp_engine_backend == 'ray'
    return same_process and ray is not None and bool(ray.is_initialized())


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device('meta')
    if device.type not in ('cpu', 'cuda') or (
        device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise OptionError(
            f'vision_device {name!r} is not a device of this machine: "auto", "cpu" or "cuda:<index>".', OPTION
        )
    return torch.device('cuda', device.index or 0) if device.type == 'cuda' else device


def _require_one_kind(option: str, devices: Sequence[torch.device]) -> None:
    kinds = {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu' for device in devices}
    if len(kinds) > 1:
        # Devices of different kinds compute different bits: a tile's tokens would depend on its device.
        raise OptionError(
            f'vision_device {option!r}: several devices must be of one kind, not {", ".join(sorted(kinds))}; set it to '
            f'some of one kind, for example {SETTING}.',
            OPTION,
        )
