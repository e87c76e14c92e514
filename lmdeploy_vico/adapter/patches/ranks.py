"""Changes to how LMDeploy starts the ranks of a ViCO model's engine, and to what it does when one of them ends."""

from typing import Any

from lmdeploy_vico.patching import Call, Patch

_RANK = 'lmdeploy.pytorch.engine.executor.mp_executor:ExecutorProc'
_RAY = 'lmdeploy.pytorch.engine.executor.ray_executor:RayExecutor'
_WORKER = 'lmdeploy.pytorch.engine.executor.base_worker:WorkerWrapperBase'


def end_with_each_rank(call: Call) -> None:
    """Reserve the shared memory of a ViCO model's tensor-parallel rank, and end the engine when it ends by itself."""
    from lmdeploy_vico.adapter.engine.ranks import reserve_buffers, runs_vico, watch_rank

    passed = call['kwargs']
    if not runs_vico(passed['model_config']):
        call.proceed()
        return
    reserve_buffers(passed['comm_buf_name'], passed['ret_buf_name'])
    call.proceed()
    watch_rank(call.instance)


def let_ranks_end(call: Call) -> None:
    """Note that a rank is meant to end."""
    from lmdeploy_vico.adapter.engine.ranks import rank_may_end

    rank_may_end(call.instance)
    call.proceed()


def end_with_each_worker(call: Call) -> Any:
    """End the engine of a ViCO model when one of Ray's workers has died."""
    from lmdeploy_vico.adapter.engine.ranks import runs_vico, wait_with_workers

    executor = call.instance
    return wait_with_workers(executor.workers, call.proceed()) if runs_vico(executor.model_config) else call.proceed()


def know_whose_ranks_are_placed(call: Call) -> None:
    """Note, while Ray is asked for room, that a ViCO model asks."""
    from lmdeploy_vico.adapter.engine.ranks import placing_ranks, runs_vico

    if not runs_vico(call['model_config']):
        call.proceed()
        return
    with placing_ranks():
        call.proceed()


def say_what_is_waited_for(call: Call) -> None:
    """Say what a Ray cluster lacks that has no room for a ViCO model's ranks."""
    from lmdeploy_vico.adapter.engine.ranks import say_what_ray_lacks

    say_what_ray_lacks(call['current_placement_group'])
    call.proceed()


PATCHES = (
    Patch(
        end_with_each_rank,
        f'{_RANK}.start',
        '(self, **kwargs)',
        why='Without one of its ranks the engine waits for ever, and /health stays well. A full /dev/shm, which '
        'containers have by default, ends a rank at its first large message.',
        until='LMDeploy watches the processes of its executor, and reserves their buffers.',
        process='engine',
        uses={f'{_RANK}.__init__': '(self, proc_id, mp_ctx)'},
    ),
    Patch(
        end_with_each_worker,
        f'{_RAY}.wait_tasks',
        '(self)',
        why='LMDeploy passes over a worker that has died. The server stays, and answers 503 to everything.',
        until='LMDeploy ends its engine when a worker has died.',
        process='engine',
        uses={f'{_WORKER}.wait_tasks': '(self)'},
    ),
    Patch(
        let_ranks_end,
        f'{_RANK}.close',
        '(self)',
        why='A rank that LMDeploy ends itself is no reason to end the engine.',
        until='as the first one',
        process='engine',
    ),
    Patch(
        know_whose_ranks_are_placed,
        f'{_RAY}.__init__',
        '(self, model_path, model_config, cache_config, backend_config, dist_config, misc_config, adapters=None, '
        "device_type='cuda', dtype='auto', specdecode_config=None, trust_remote_code=False)",
        why='Where LMDeploy waits for Ray it does not know for which model.',
        until='as the next one',
        process='engine',
    ),
    Patch(
        say_what_is_waited_for,
        'lmdeploy.pytorch.ray:_wait_until_pg_ready',
        '(current_placement_group)',
        why='LMDeploy waits half an hour for GPUs that a Ray cluster does not have, and says so at level INFO only.',
        until='LMDeploy says what is missing.',
        process='engine',
    ),
)
