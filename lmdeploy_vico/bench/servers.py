"""The servers that a measurement starts: the plugin's, and LMDeploy without the plugin's classes."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.workload.requests import INTERNVL, LLM, OURS_ON_TURBOMIND, SERVER_OF_ENGINE, TURBOMIND
from lmdeploy_vico.checkpoints.names import FLASH
from lmdeploy_vico.checkpoints.safetensors_format import (
    INDEX_FILE,
    DamagedFileError,
    StoredTensor,
    header_bytes,
    read_header,
)
from lmdeploy_vico.launch import ApiServer

FLASH_KEYS = ('flash_mode', 'flash_relative_threshold', 'flash_absolute_threshold')
HUB_ID = re.compile(r'^[\w.-]+/[\w.-]+$')
EXCEPTION = re.compile(r'^\s*(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*')
COPIED = 2**24  # bytes at a time
LOG_END = 2**20  # bytes of a log in which the last exception is looked for
# What of the environment decides how a server works.
RECORDED = re.compile(r'^(LMDEPLOY|OMP_|CUDA_VISIBLE_DEVICES)')
OWN_ARGUMENTS = ('--server-name', '--server-port')
SHARE = '--cache-max-entry-count'
DEVICE = (
    'import torch; print(torch.cuda.get_device_name() + f" x {torch.cuda.device_count()}" '
    'if torch.cuda.is_available() else "")'
)


def check_model(model: str) -> None:
    """Raises :class:`BenchError` if ``model`` is neither a checkpoint's directory nor a name on the hub."""
    path = Path(model)
    if not (path / 'config.json').is_file() and (path.exists() or not HUB_ID.match(model)):
        raise BenchError(f'--model: {model} is not a checkpoint directory: it holds no config.json.')


def check_arguments(arguments: Sequence[str], servers: Sequence[str], together: bool, on_gpu: bool) -> None:
    """Raises :class:`BenchError` for arguments with which no server, or no fair measurement, would come about."""
    given = {argument.partition('=')[0] for argument in arguments}
    for own in OWN_ARGUMENTS:
        if own in given:
            raise BenchError(f'{own} is chosen here, for every server: leave it out.')
    for name in (OURS_ON_TURBOMIND, TURBOMIND):
        if name in servers and not on_gpu:
            raise BenchError(f'{name} needs a CUDA device.')
    if together and on_gpu and len(servers) > 1 and SHARE not in given:
        raise BenchError(
            'Servers together on a GPU: the first would take most of the memory for its KV cache. Give each its share, '
            f'for example -- {SHARE} 0.2, or leave out --servers together.'
        )


def recorded(environment: Mapping[str, str | None]) -> dict[str, str]:
    """Variables of a server's environment that decide how it works: ours, with ``environment`` on top."""
    merged = {**os.environ, **environment}
    return {name: value for name, value in sorted(merged.items()) if value is not None and RECORDED.match(name)}


def make_server(
    name: str, model: str, modes: Sequence[str], on_gpu: bool, extra: Sequence[str], scratch: Path
) -> ApiServer:
    """The server of a baseline, or of the plugin, not started yet.

    Args:
        name: ``none`` or ``turbomind`` for the plugin, by its language engine, or a baseline.
        extra: further arguments of ``lmdeploy serve api_server``.
        scratch: a directory for its log, and for the checkpoint without a router.
    """
    environment: dict[str, str | None] = {'OMP_WAIT_POLICY': os.environ.get('OMP_WAIT_POLICY', 'PASSIVE')}
    arguments = list(extra)
    engine = next((engine for engine, server in SERVER_OF_ENGINE.items() if server == name), None)
    if engine is not None:
        environment['LMDEPLOY_VICO_LANGUAGE_ENGINE'] = engine
        environment['LMDEPLOY_VICO_CACHE_BYTES'] = '0'  # cells share pictures, and each has to pay for them
        if LLM in modes:
            environment['LMDEPLOY_VICO_SYNTHETIC_IMAGES'] = '1'
    else:
        environment['LMDEPLOY_VICO'] = '0' if on_gpu else 'cpu'
        arguments += [] if '--trust-remote-code' in arguments else ['--trust-remote-code']
        # LMDeploy would choose TurboMind for all of them, which knows nothing of flash mode.
        arguments += ['--backend', 'turbomind' if name == TURBOMIND else 'pytorch']
    if name == INTERNVL:
        model = str(without_router(Path(model), scratch / 'without-router'))
    return ApiServer(model, *arguments, log=scratch / f'{name}.log', environment=environment, timeout=1800)


def without_router(checkpoint: Path, target: Path) -> Path:
    """A copy of a ViCO checkpoint that LMDeploy serves as the InternVL model it was made from.

    LMDeploy takes a checkpoint for a flash one by ``flash_mode`` in its config, whatever the value, and stops at a
    weight it has no parameter for. So the keys go from the config, and the router and its projector from the
    safetensors files that hold them; all other files are links.

    Raises:
        BenchError: the checkpoint is not a directory of safetensors files.
    """
    if not checkpoint.is_dir():
        raise BenchError(f'The baseline {INTERNVL} needs a directory as --model, not {checkpoint}: download it first.')
    try:
        _copy_without_router(checkpoint, target)
    except DamagedFileError as error:
        raise BenchError(f'A safetensors file of {checkpoint} is damaged: {error}.') from error
    except OSError as error:
        raise BenchError(
            f'The checkpoint without a router cannot be written to {target.parent}: {error.strerror}. The variable '
            'TMPDIR names another place.'
        ) from error
    return target


def _copy_without_router(checkpoint: Path, target: Path) -> None:
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / 'config.json').read_text())
    _replace(target / 'config.json', {key: value for key, value in config.items() if key not in FLASH_KEYS})
    for file in sorted(checkpoint.glob('*.safetensors')):
        copy_without(file, target / file.name, FLASH)
    if (target / INDEX_FILE).is_file():
        index = json.loads((checkpoint / INDEX_FILE).read_text())
        index['weight_map'] = {k: v for k, v in index['weight_map'].items() if not k.startswith(FLASH)}
        _replace(target / INDEX_FILE, index)


def _replace(file: Path, content: Any) -> None:
    file.unlink()
    file.write_text(json.dumps(content, indent=2))


def copy_without(source: Path, target: Path, prefixes: tuple[str, ...]) -> None:
    """Replace the link ``target`` by a copy of a safetensors file without some tensors.

    The link stays if the file has none of these tensors.

    Args:
        source: the file.
        target: a link to it.
        prefixes: how the names of the tensors that are left out begin.

    Raises:
        DamagedFileError: ``source`` is not a whole safetensors file.
        OSError: the copy cannot be written.
    """
    with source.open('rb') as file:
        tensors, about = read_header(file)
        first = file.tell()
        if not any(name.startswith(prefixes) for name in tensors):
            return
        kept = [(name, tensor) for name, tensor in tensors.items() if not name.startswith(prefixes)]
        kept.sort(key=lambda item: item[1].start)
        moved, end = {}, 0
        for name, tensor in kept:
            start, end = end, end + tensor.nbytes
            moved[name] = StoredTensor(tensor.dtype, tensor.shape, start, end)
        target.unlink()
        with target.open('wb') as copy:
            copy.write(header_bytes(moved, about))
            for _, tensor in kept:
                file.seek(first + tensor.start)
                _copy(file, copy, tensor.nbytes)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(size, COPIED))
        if not block:
            raise DamagedFileError('a file became shorter while it was read')
        target.write(block)
        size -= len(block)


def why_ended(server: ApiServer | None) -> str:
    """The last exception in the server's log, or what little is known."""
    if server is None:
        return 'its log tells why'
    errors = [line.strip() for line in server.log_text(LOG_END).splitlines() if EXCEPTION.match(line)]
    return errors[-1] if errors else 'its log names no exception'


def gpu_name() -> str:
    """The CUDA devices of this machine, empty without one; torch is asked in a process of its own."""
    command = [sys.executable, '-c', DEVICE]
    environment = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return answer.stdout.strip() if answer.returncode == 0 else ''


def environment(device: str | None) -> dict[str, Any]:
    """Versions and the machine; ``device`` None where the server runs elsewhere and its device is not known."""
    versions: dict[str, str | None] = {}
    for package in ('lmdeploy-vico', 'lmdeploy', 'torch', 'transformers', 'triton', 'aiohttp'):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cpu = f'{platform.machine()}, {os.cpu_count()} cores'
    return {'device': device, 'cpu': cpu, 'python': platform.python_version(), **versions, 'commit': _commit()}


def _commit() -> str | None:
    git = shutil.which('git')
    if git is None:
        return None
    command = [git, '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None if answer.returncode == 0 else None
