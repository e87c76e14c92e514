"""Changes that lead LMDeploy to the CPU backend on a machine without CUDA.

They are made when LMDeploy is imported, and ask :mod:`lmdeploy_vico.cpu.selection` at every call: where CUDA, or
another accelerator, serves, LMDeploy's own function is called. What the engine needs is changed when an engine starts
(:mod:`lmdeploy_vico.cpu.engine`). LMDeploy must not be imported here: it may be half imported when this module is.
"""

import asyncio
from typing import Any

from lmdeploy_vico.cpu import ray_patches, selection
from lmdeploy_vico.patching import Call, Patch, Trigger, register

# Sequences batched at most, in place of what LMDeploy derives from the name of the GPU.
MAX_BATCH_SIZE = 32

_ENGINE = 'lmdeploy.pytorch.engine.engine:Engine'
_EXECUTOR = 'lmdeploy.pytorch.engine.executor.mp_executor'


def answer_batch_size(call: Call) -> int:
    """Answer ``get_max_batch_size`` without CUDA."""
    return MAX_BATCH_SIZE if selection.runs_on_cpu(call['device_type']) else call.proceed()


def answer_bf16_support(call: Call) -> bool:
    """Answer ``is_bf16_supported`` without CUDA."""
    return True if selection.runs_on_cpu(call['device_type']) else call.proceed()


def keep_float32(call: Call) -> Any:
    """Keep a float32 checkpoint in float32."""
    config = call.proceed()
    written = getattr(config.hf_config, 'dtype', None)
    if call['dtype'] == 'auto' and selection.runs_on_cpu(call['device_type']) and str(written).endswith('float32'):
        import torch

        config.dtype = torch.float32
    return config


def rule_out_turbomind(call: Call) -> bool:
    """Have LMDeploy choose its PyTorch engine without CUDA."""
    return call.proceed() if selection.has_cuda() else False


def check_engine_options(call: Call) -> Any:
    """Refuse options that the CPU backend does not have before an engine is started."""
    if _on_cpu(call['engine_config']):
        selection.check_supported(call['engine_config'], call['speculative_config'])
        selection.announce()
    return call.proceed()


def start_engine_on_cpu(call: Call) -> None:
    """Install the CPU backend where an engine starts: in this process, or in the one that it spawns."""
    if _on_cpu(call['engine_config']):
        from lmdeploy_vico.cpu import engine

        selection.check_supported(call['engine_config'])
        selection.announce()
        engine.install()
    call.proceed()


def leave_cuda_checks_out(call: Call) -> Any:
    """Leave the CUDA and Triton checks out of LMDeploy's start-up checks, and run the others in this process."""
    checks = call.instance
    if not selection.runs_on_cpu(checks.engine_config.device_type):
        return call.proceed()
    from lmdeploy.pytorch.check_env.torch import TorchChecker
    from lmdeploy.pytorch.check_env.triton import TritonChecker

    checks._required_checker = [each for each in checks._required_checker if not isinstance(each, TritonChecker)]
    for checker in checks._required_checker:
        for required in checker._required_checker:
            if isinstance(required, TorchChecker):
                required.device = 'cpu'
    return checks._handle_impl()


def start_worker_on_cpu(call: Call) -> None:
    """Install the CPU backend in the tensor-parallel worker processes, and share the processor between them."""
    if selection.runs_on_cpu(call['device_type']):
        from lmdeploy_vico.cpu import engine, memory

        memory.share_host(call['dist_config'].world_size)
        engine.install()
    call.proceed()


async def receive_beside_the_loop(call: Call) -> Any:
    """Keep a process's event loop running while it waits for a message of LMDeploy's ring, and for the other ranks."""
    if not register.reached(Trigger.CPU_ENGINE):
        return await call.proceed()
    return await asyncio.get_running_loop().run_in_executor(None, call.instance.receive)


def _on_cpu(engine_config: Any) -> bool:
    return selection.runs_on_cpu(getattr(engine_config, 'device_type', 'cuda'))


_ASKS_CUDA = (
    "LMDeploy asks torch.cuda in the server's process, before an engine exists. Several modules import the function by "
    'name, so each of them is changed.'
)

PATCHES = (
    *(
        Patch(
            answer_batch_size,
            f'{module}:get_max_batch_size',
            '(device_type)',
            why=_ASKS_CUDA,
            until='LMDeploy asks its backend instead of torch.cuda.',
            process='server',
        )
        for module in ('lmdeploy.utils', 'lmdeploy.cli.serve', 'lmdeploy.pytorch.engine.config_builder')
    ),
    *(
        Patch(
            answer_bf16_support,
            f'{module}:is_bf16_supported',
            "(device_type='cuda')",
            why=_ASKS_CUDA,
            until='LMDeploy asks its backend instead of torch.cuda.',
            process='server and engine',
        )
        for module in ('lmdeploy.utils', 'lmdeploy.vl.engine', 'lmdeploy.pytorch.config')
    ),
    Patch(
        keep_float32,
        'lmdeploy.pytorch.config:_update_torch_dtype',
        "(config, dtype, device_type='auto')",
        why='LMDeploy would convert the checkpoint to float16, the slowest type of a CPU.',
        until="LMDeploy takes dtype='float32'.",
        process='server and engine',
    ),
    Patch(
        rule_out_turbomind,
        'lmdeploy.turbomind.supported_models:is_supported',
        '(model_path, trust_remote_code=False)',
        why='LMDeploy chooses TurboMind, which only runs on CUDA, without looking for a device.',
        until='lmdeploy.archs.autoget_backend looks for a device.',
        process='server',
    ),
    Patch(
        check_engine_options,
        f'{_ENGINE}.from_pretrained',
        '(cls, pretrained_model_name_or_path, engine_config=None, speculative_config=None, trust_remote_code=False, '
        '**kwargs)',
        why='An option that the CPU backend lacks would fail later, in words that do not name it.',
        until='LMDeploy has a CPU device type.',
        process='engine',
    ),
    Patch(
        start_engine_on_cpu,
        f'{_ENGINE}.__init__',
        '(self, model_path, engine_config=None, trust_remote_code=False, speculative_config=None)',
        why="LMDeploy's engine knows no CPU.",
        until='LMDeploy has a CPU device type.',
        process='engine',
    ),
    Patch(
        leave_cuda_checks_out,
        'lmdeploy.pytorch.engine.engine_checker:EngineChecker.handle',
        '(self)',
        why='The checks fail without CUDA. LMDeploy runs them in a process of their own to keep CUDA out of its own, '
        'which costs seconds.',
        until='LMDeploy chooses its checks by the device that is there.',
        process='engine',
        uses={
            'lmdeploy.pytorch.engine.engine_checker:EngineChecker._handle_impl': '(self)',
            'lmdeploy.pytorch.check_env.torch:TorchChecker': "(device='cuda', logger=None)",
            'lmdeploy.pytorch.check_env.triton:TritonChecker': '(logger=None)',
        },
    ),
    *(
        Patch(
            start_worker_on_cpu,
            target,
            signature,
            why="LMDeploy's engine knows no CPU.",
            until='LMDeploy has a CPU device type.',
            process='engine',
        )
        for target, signature in (
            (
                f'{_EXECUTOR}:ExecutorProc._main_loop',
                '(self, proc_id, comm_notifier, comm_buf_name, ret_notifier, ret_buf_name, model_path, model_config, '
                'cache_config, backend_config, dist_config, misc_config, specdecode_config=None, adapters=None, '
                "device_type='cuda', log_level=30, trust_remote_code=False)",
            ),
            (
                # What Ray's workers call first that Ray does not send them by value, see ray_patches.py.
                'lmdeploy.pytorch.engine.executor.base_worker:WorkerWrapperBase.__init__',
                '(self, model_path, cache_config, backend_config, model_config, dist_config, misc_config, '
                "adapters=None, device_type='cuda', log_level=30, specdecode_config=None, trust_remote_code=False)",
            ),
        )
    ),
    *ray_patches.PATCHES,
    Patch(
        receive_beside_the_loop,
        f'{_EXECUTOR}:SharedBuffer.receive_async',
        '(self)',
        why="LMDeploy waits for all ranks at the end of its ring on the event loop. There gloo's collectives, which "
        "block, wait for what this loop has still to start: a rank at the ring's end and one in a collective then wait "
        'for each other for ever. Messages of several packages reach the end in a loop of their own.',
        until='LMDeploy receives in a thread, or its mp executor is gone.',
        process='engine',
        uses={f'{_EXECUTOR}:SharedBuffer.receive': '(self)'},
    ),
)
