"""Changes to LMDeploy's Ray executor, in the engine's process and in the workers that Ray starts.

Those of Ray itself are made when its modules are imported, which an engine without Ray never does.
"""

from typing import Any

from lmdeploy_vico.cpu import selection
from lmdeploy_vico.patching import Call, Patch, Target

_EXECUTOR = 'lmdeploy.pytorch.engine.executor.ray_executor'
_UNTIL = 'LMDeploy has a CPU device type.'


def prefer_processes(call: Call) -> Any:
    """Choose the ``mp`` executor unless Ray's is asked for or needed."""
    chosen = call.proceed()
    if chosen != 'ray' or call['dp'] > 1 or not selection.runs_on_cpu(call['device_type']):
        return chosen
    from lmdeploy.pytorch import envs

    return envs.executor_backend or 'mp'


def lend_logical_devices(call: Call) -> Any:
    """Have Ray count a logical GPU for each rank, in a small cluster of the engine's own unless one runs."""
    if selection.runs_on_cpu(call['device_type']):
        from lmdeploy_vico.cpu import cluster

        cluster.start(call['world_size'], call['ray_address'])
    return call.proceed()


def hide_devices_from_workers(call: Call) -> Any:
    """Have Ray's workers run on the CPU as the engine does, also on nodes with GPUs."""
    environment = call.proceed()
    if not selection.runs_on_cpu():
        return environment
    from lmdeploy_vico.cpu import cluster

    return cluster.hide_devices(environment)


def need_no_symmetric_memory(call: Call) -> Any:
    """Answer without CUDA that workers need no memory that other devices can reach."""
    return False if selection.runs_on_cpu() else call.proceed()


def leave_cuda_warm_up_out(target: Target) -> None:
    """Leave the first all-reduce, of a tensor on a CUDA device, out."""
    if selection.runs_on_cpu():
        target.replace(skip_warm_up)


def skip_warm_up(worker: Any) -> None:
    """Do nothing, in place of a method of a Ray worker: Ray sends plain functions of modules to workers by name.

    A wrapped method would be sent by value, without what wraps it.
    """


PATCHES = (
    Patch(
        prefer_processes,
        'lmdeploy.pytorch.engine.executor:get_distributed_executor_backend',
        '(world_size, dp, device_type, logger=None)',
        why='LMDeploy prefers Ray where it runs. On a CPU it takes longer to start than a trial takes.',
        until=_UNTIL,
        process='server and engine',
        uses={'lmdeploy.pytorch.envs:executor_backend': None},
    ),
    Patch(
        lend_logical_devices,
        'lmdeploy.pytorch.ray:init_ray_cluster',
        "(world_size, ray_address=None, dp=1, device_type='cuda')",
        why='Ray counts no GPU on a machine without one: LMDeploy would wait half an hour for them. Its object store '
        'would take 30 % of the memory.',
        until=_UNTIL,
        process='engine',
    ),
    Patch(
        hide_devices_from_workers,
        f'{_EXECUTOR}:_update_runtime_envs',
        '(runtime_env)',
        why="Ray makes the device with a logical GPU's number visible to a worker, which would then run on CUDA.",
        until=_UNTIL,
        process='engine',
    ),
    Patch(
        need_no_symmetric_memory,
        f'{_EXECUTOR}:_needs_symm_mem_device_setup',
        '(dist_config)',
        why='The function asks the CUDA backend.',
        until=_UNTIL,
        process='engine',
    ),
    Patch(
        leave_cuda_warm_up_out,
        f'{_EXECUTOR}:RayWorkerWrapper.warmup_dist',
        why="The tensor is made on 'cuda'.",
        until=_UNTIL,
        process='engine',
    ),
)
