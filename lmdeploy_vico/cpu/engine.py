"""Changes to LMDeploy's engine, made when an engine starts on the CPU in this process and never before.

:func:`install` is called from the entry points that :mod:`lmdeploy_vico.cpu.patches` wraps. Everything here replaces
names inside LMDeploy's modules; ``torch`` itself is not touched. LMDeploy is not imported here, so that its fit can be
checked.
"""

import dataclasses
from functools import partial
from typing import Any

import torch

from lmdeploy_vico.cpu import gathering, memory
from lmdeploy_vico.cpu.stand_ins import TorchView
from lmdeploy_vico.patching import Call, Patch, Target, Trigger, register

# Modules that create streams and events, ask CUDA about the device or allocate the caches.
_VIEWED = (
    'lmdeploy.pytorch.engine.engine',
    'lmdeploy.pytorch.engine.logits_process',
    'lmdeploy.pytorch.engine.cache_engine.engine',
    'lmdeploy.pytorch.engine.cache_engine.layout',
    'lmdeploy.pytorch.engine.model_agent.agent',
    'lmdeploy.pytorch.engine.model_agent.inputs_maker',
    'lmdeploy.pytorch.engine.executor.mp_executor',
    'lmdeploy.pytorch.models.patch',
)
_VIEW = TorchView()
_AGENT = 'lmdeploy.pytorch.engine.model_agent.agent'
_SELECTOR = 'lmdeploy.pytorch.backends.selector'
_UNTIL = "LMDeploy takes the device from its backend instead of writing 'cuda'."


def install() -> None:
    """Make this process's LMDeploy engine run on the CPU; repeating it does nothing.

    Raises:
        PatchError: LMDeploy cannot be changed as needed.
    """
    register.install(PATCHES)
    register.apply(Trigger.CPU_ENGINE)


def view_torch(target: Target) -> None:
    """Show an engine module a ``torch`` without CUDA."""
    target.replace(_VIEW)


def choose_cpu_backend(call: Call) -> Any:
    """Answer LMDeploy's question for the backend of ``cuda`` with the CPU backend."""
    from lmdeploy.pytorch.backends.selector import get_device_manager

    from lmdeploy_vico.cpu.backend import CpuOpsBackend

    return CpuOpsBackend if get_device_manager().current_context().device_type == 'cuda' else call.proceed()


def put_agent_on_cpu(call: Call) -> None:
    """Give the model agent the CPU as its device."""
    call.proceed()
    call.instance.device = 'cpu'


def choose_agent_threads(call: Call) -> None:
    """Choose how many threads compute the model before its agent starts."""
    memory.choose_threads(call.instance.patched_model.get_model())
    call.proceed()


def skip_warm_up(call: Call) -> None:
    """Leave the warm-up out: no kernel is compiled or tuned and no graph is captured."""


def copy_inputs(call: Call) -> Any:
    """Copy a forward input instead of moving it to a GPU."""
    return _own_copy(call['val'])


def report_host_memory(call: Call) -> Any:
    """Report the host's memory as the GPU's."""
    return TorchView.cuda.mem_get_info(call['device_id'])


def allocate_on_host(call: Call) -> Any:
    """Allocate block and state caches in host memory."""
    return call.proceed(device=TorchView.device(call['device']))


def build_layer_on_cpu(call: Call) -> Any:
    """Build a layer on the CPU where no device is named."""
    return call.proceed(device='cpu') if call['device'] is None else call.proceed()


def gather_unevenly(call: Call) -> Any:
    """Gather the tokens of ranks that have different numbers of them."""
    gathered = gathering.gather(call['x'], call['tp_sizes'], call['group'])
    return (gathered, gathering.Done()) if call['async_op'] else gathered


def reduce_scatter_unevenly(call: Call) -> Any:
    """Sum over ranks, each of which keeps its own tokens."""
    gathering.reduce_scatter(call['output'], call['input_list'], call['group'])
    return gathering.Done() if call['async_op'] else None


def reduce_scatter_by_sizes(call: Call) -> Any:
    """Sum over ranks, each of which keeps as many tokens as it has."""
    return gathering.reduce_scatter_by_sizes(call['out'], call['rank'], call['tp_sizes'], call['group'])


def _own_copy(value: Any) -> Any:
    """Copy a forward input: a move to a GPU would copy it, and the agent changes some of its tensors in place."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.clone()
    value = value.to_device('cpu')
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        tensor = getattr(value, field.name)
        if isinstance(tensor, torch.Tensor):
            setattr(value, field.name, tensor.clone())
    return value


# All of these are made in the same process, by the same event, and can go together.
_patch = partial(Patch, until=_UNTIL, process='engine', trigger=Trigger.CPU_ENGINE)


_DISTRIBUTED = 'lmdeploy.pytorch.distributed'
_LINEAR = 'lmdeploy.pytorch.nn.linear.base'

PATCHES = (
    *(
        _patch(
            view_torch,
            f'{module}:torch',
            why="The module creates streams and events, asks CUDA about the device, or allocates the caches on 'cuda'.",
        )
        for module in _VIEWED
    ),
    _patch(
        choose_cpu_backend,
        f'{_SELECTOR}:_get_backend',
        '()',
        why='LMDeploy has no backend for the CPU.',
        uses={
            f'{_SELECTOR}:get_device_manager': '()',
            'lmdeploy.pytorch.backends.default.rotary_embedding:_rotary_embedding_fwd': '(position_ids, inv_freq, '
            'scaling_factor, mscale=None, dtype=None, device_type=None)',
        },
    ),
    _patch(
        put_agent_on_cpu,
        f'{_AGENT}:BaseModelAgent.__init__',
        '(self, model_path, model_config, cache_config, backend_config, misc_config, dist_ctx, device_ctx, '
        'adapters=None, specdecode_config=None, trust_remote_code=False)',
        why="The model agent's device is 'cuda'.",
    ),
    _patch(
        choose_agent_threads,
        f'{_AGENT}:BaseModelAgent.start',
        '(self, forward_event=None)',
        why='The best number of threads depends on the size of the model.',
    ),
    _patch(
        skip_warm_up,
        f'{_AGENT}:BaseModelAgent.warmup',
        '(self)',
        why='A warm-up takes time, and there is nothing to warm up.',
    ),
    _patch(
        copy_inputs,
        f'{_AGENT}:_try_to_cuda',
        '(val, non_blocking=False)',
        why='The function moves the inputs to the GPU.',
    ),
    _patch(
        report_host_memory,
        f'{_AGENT}:get_gpu_memory',
        '(device_id=None)',
        why='The size of the caches is derived from the free memory of the GPU.',
    ),
    *(
        _patch(
            allocate_on_host,
            f'lmdeploy.pytorch.engine.cache_engine.{function}',
            signature,
            why="The caches are allocated on 'cuda'.",
        )
        for function, signature in (
            ('plan:BlockCachePlan.allocate', '(self, num_logical_blocks, device)'),
            ('state:_allocate_state_caches', '(tensor_specs, num_caches, device)'),
        )
    ),
    *(
        _patch(
            build_layer_on_cpu,
            f'lmdeploy.pytorch.nn.{layer}.create_weight',
            signature,
            why="A layer that is built without a device is built on 'cuda'.",
        )
        for layer, signature in (
            ('norm:RMSNorm', '(hidden_size, dtype=None, device=None)'),
            ('norm:LayerNorm', '(hidden_size, bias=True, dtype=None, device=None)'),
            ('embedding:ParallelEmbedding', '(vocab_size, hidden_size, dtype=None, device=None)'),
        )
    ),
    *(
        _patch(change, f'{module}:{function}', signature, why='gloo gathers and scatters only tensors of one size.')
        for change, function, signature, modules in (
            (
                gather_unevenly,
                'gather_by_tp_sizes',
                '(x, tp_sizes, group=None, async_op=False)',
                (_DISTRIBUTED, _LINEAR),
            ),
            (
                reduce_scatter_by_sizes,
                'reduce_scatter_by_tp_sizes',
                '(out, rank, tp_sizes, group)',
                (_DISTRIBUTED, _LINEAR),
            ),
            (
                reduce_scatter_unevenly,
                'reduce_scatter',
                "(output, input_list, op=<RedOpType.SUM: 0>, group='tp', async_op=False)",
                (_DISTRIBUTED,),
            ),
        )
        for module in modules
    ),
)
