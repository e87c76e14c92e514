"""Post-import hooks of the CPU backend: where LMDeploy, on a machine without CUDA, is led to it.

Each hook wraps functions of one LMDeploy module. The wrappers ask :func:`selection.runs_on_cpu` when they are called
and hand over to the original where CUDA, or another accelerator, serves; what the engine needs is installed when an
engine starts (:mod:`lmdeploy_vico.cpu.engine`), not when LMDeploy is imported. LMDeploy must not be imported here:
it may be half imported when this module is.
"""

import asyncio
import contextlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from . import selection

# Sequences batched at most, in place of what LMDeploy derives from the name of the GPU.
MAX_BATCH_SIZE = 32


def wrap_once(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once; a name that this LMDeploy lacks is an error."""
    held = vars(owner)[name]
    function = held.__func__ if isinstance(held, staticmethod | classmethod) else held
    if getattr(function, '_vico_wrapped', False):
        return
    wrapper: Any = wraps(function)(make(function))
    wrapper._vico_wrapped = True
    setattr(owner, name, type(held)(wrapper) if isinstance(held, staticmethod | classmethod) else wrapper)


def _on_cpu(engine_config: Any) -> bool:
    return selection.runs_on_cpu(getattr(engine_config, 'device_type', 'cuda'))


def _device_questions(module: ModuleType) -> None:
    """Answer ``get_max_batch_size`` and ``is_bf16_supported`` without CUDA.

    LMDeploy asks them in the server's process, before an engine exists. Imported by name into several modules, hence
    a hook on each of them. Can go when LMDeploy asks its backend instead of ``torch.cuda``.
    """

    def batch_size(original):
        return lambda device_type: MAX_BATCH_SIZE if selection.runs_on_cpu(device_type) else original(device_type)

    def bf16(original):
        return lambda device_type='cuda': True if selection.runs_on_cpu(device_type) else original(device_type)

    for name, make in (('get_max_batch_size', batch_size), ('is_bf16_supported', bf16)):
        if name in vars(module):
            wrap_once(module, name, make)


def _model_config(module: ModuleType) -> None:
    """Keep a float32 checkpoint in float32, which LMDeploy would convert to float16, the slowest type of a CPU.

    Also answers the device questions that this module has imported. Can go when LMDeploy takes ``dtype='float32'``.
    """
    _device_questions(module)

    def update_dtype(original):
        def wrapper(config, dtype, device_type='auto'):
            config = original(config, dtype, device_type=device_type)
            written = getattr(config.hf_config, 'dtype', None)
            if dtype == 'auto' and selection.runs_on_cpu(device_type) and str(written).endswith('float32'):
                import torch

                config.dtype = torch.float32
            return config

        return wrapper

    wrap_once(module, '_update_torch_dtype', update_dtype)


def _turbomind(module: ModuleType) -> None:
    """Say that TurboMind, which only runs on CUDA, serves no model, so that LMDeploy chooses its PyTorch engine.

    Can go when ``lmdeploy.archs.autoget_backend`` looks for a device.
    """

    def is_supported(original):
        return lambda *args, **kwargs: original(*args, **kwargs) if selection.has_cuda() else False

    wrap_once(module, 'is_supported', is_supported)


def _engine(module: ModuleType) -> None:
    """Install the CPU backend where an engine starts: in this process, or in the one that it spawns.

    Can go when LMDeploy has a CPU device type.
    """

    def from_pretrained(original):
        def wrapper(cls, pretrained_model_name_or_path, engine_config=None, speculative_config=None, **kwargs):
            if _on_cpu(engine_config):
                selection.check_supported(engine_config, speculative_config)
                selection.announce()
            return original(cls, pretrained_model_name_or_path, engine_config, speculative_config, **kwargs)

        return wrapper

    def init(original):
        def wrapper(self, model_path, engine_config=None, *args, **kwargs):
            if _on_cpu(engine_config):
                from . import engine

                selection.check_supported(engine_config)
                selection.announce()
                engine.install()
            original(self, model_path, engine_config, *args, **kwargs)

        return wrapper

    wrap_once(module.Engine, 'from_pretrained', from_pretrained)
    wrap_once(module.Engine, '__init__', init)


def _engine_checker(module: ModuleType) -> None:
    """Leave the CUDA and Triton checks out of LMDeploy's start-up checks, and run the others in this process.

    LMDeploy runs them in a spawned process to keep CUDA out of its own, which costs seconds. Can go when LMDeploy
    chooses its checks by the device that is there.
    """

    def handle(original):
        def wrapper(self):
            if not selection.runs_on_cpu(self.engine_config.device_type):
                return original(self)
            from lmdeploy.pytorch.check_env.torch import TorchChecker
            from lmdeploy.pytorch.check_env.triton import TritonChecker

            self._required_checker = [c for c in self._required_checker if not isinstance(c, TritonChecker)]
            for checker in self._required_checker:
                for required in checker._required_checker:
                    if isinstance(required, TorchChecker):
                        required.device = 'cpu'
            return self._handle_impl()

        return wrapper

    wrap_once(module.EngineChecker, 'handle', handle)


def _mp_executor(module: ModuleType) -> None:
    """Install the CPU backend in the tensor-parallel worker processes, and share the processor between them.

    Can go when LMDeploy has a CPU device type.
    """

    def main_loop(original):
        def wrapper(self, *args, device_type='cuda', dist_config=None, **kwargs):
            if selection.runs_on_cpu(device_type):
                from . import engine, memory

                memory.share_host(dist_config.world_size)
                engine.install()
            original(self, *args, device_type=device_type, dist_config=dist_config, **kwargs)

        return wrapper

    wrap_once(module.ExecutorProc, '_main_loop', main_loop)


def _mp_notifier(module: ModuleType) -> None:
    """Keep a worker's event loop running while it waits for the others at the end of LMDeploy's ring of messages.

    LMDeploy waits there in the loop itself, where the worker's forward runs too. With CUDA the others' collectives only
    wait on the device; here one of them may stand in an all-reduce that needs the waiting worker's forward, and both
    wait for ever. Can go when ``Notifier.wait_async`` awaits its barrier.
    """

    def wait_async(original):
        @contextlib.asynccontextmanager
        async def wrapper(self):
            from . import engine

            if not engine.installed():
                async with original(self):
                    yield
                return
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self.events[self._event_id].wait)
            yield
            if self._event_id == module.NUM_SHARED_BLOCK - 1:
                await loop.run_in_executor(None, self.bar.wait)
                await loop.run_in_executor(None, self.bar.wait)
            self._update_event_id()

        return wrapper

    wrap_once(module.Notifier, 'wait_async', wait_async)


def _tensor_parallel(module: ModuleType) -> None:
    _mp_executor(module)
    _mp_notifier(module)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    'lmdeploy.utils': _device_questions,
    'lmdeploy.cli.serve': _device_questions,
    'lmdeploy.vl.engine': _device_questions,
    'lmdeploy.pytorch.config': _model_config,
    'lmdeploy.pytorch.engine.config_builder': _device_questions,
    'lmdeploy.turbomind.supported_models': _turbomind,
    'lmdeploy.pytorch.engine.engine': _engine,
    'lmdeploy.pytorch.engine.engine_checker': _engine_checker,
    'lmdeploy.pytorch.engine.executor.mp_executor': _tensor_parallel,
}
