"""Changes to how LMDeploy starts the ranks of a ViCO model's engine, and to what it does when one of them ends."""

from typing import Any

from lmdeploy_vico.patching import Call, Patch

_RANK = 'lmdeploy.pytorch.engine.executor.mp_executor:ExecutorProc'
_MP = 'lmdeploy.pytorch.engine.executor.mp_executor:MPExecutor'
_RING = 'lmdeploy.pytorch.engine.executor.mp_executor:SharedBuffer'
_NOTIFIER = 'lmdeploy.pytorch.engine.executor.mp_executor:Notifier'
_RAY = 'lmdeploy.pytorch.engine.executor.ray_executor:RayExecutor'
_WORKER = 'lmdeploy.pytorch.engine.executor.base_worker:WorkerWrapperBase'
# What the process of a rank runs: the target and its signature.
RANK_LOOP = (
    f'{_RANK}._main_loop',
    '(self, proc_id, comm_notifier, comm_buf_name, ret_notifier, ret_buf_name, model_path, model_config, '
    'cache_config, backend_config, dist_config, misc_config, specdecode_config=None, adapters=None, '
    "device_type='cuda', log_level=30, trust_remote_code=False)",
)


def end_with_each_rank(call: Call) -> None:
    """Reserve the shared memory of a ViCO model's tensor-parallel rank, and end the engine when it ends by itself."""
    from lmdeploy_vico.adapter.engine.ranks import reserve_buffers, runs_vico, watch_rank
    from lmdeploy_vico.adapter.engine.ring import know_rings

    passed = call['kwargs']
    if not runs_vico(passed['model_config']):
        call.proceed()
        return
    names = passed['comm_buf_name'], passed['ret_buf_name']
    reserve_buffers(*names)
    know_rings(*names)
    call.proceed()
    watch_rank(call.instance)


def let_ranks_end(call: Call) -> None:
    """Note that a rank is meant to end."""
    from lmdeploy_vico.adapter.engine.ranks import rank_may_end

    rank_may_end(call.instance)
    call.proceed()


def end_rank_with_its_steps(call: Call) -> None:
    """End the process of a ViCO model's rank when a step of the model has failed."""
    from lmdeploy.pytorch.engine.executor.mp_executor import MPWorkerWrapper

    from lmdeploy_vico.adapter.engine.ranks import end_with_steps, runs_vico

    call.proceed()
    if isinstance(call.instance, MPWorkerWrapper) and runs_vico(call.instance.model_config):
        end_with_steps(call.instance)


def end_rank_with_its_calls(call: Call) -> Any:
    """End the process of a ViCO model's rank when a call of the engine has failed."""
    from lmdeploy_vico.adapter.engine.ranks import call_in_rank, runs_vico

    worker = call['func'].__self__
    return call_in_rank(call.proceed()) if runs_vico(worker.model_config) else call.proceed()


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


def send_beside_the_loop(call: Call) -> Any:
    """Put the visual tokens of a step into Ray's store in a thread."""
    from lmdeploy_vico.adapter.engine.spans import beside_the_loop, carries_spans

    return beside_the_loop(call.proceed()) if carries_spans(call['inputs']) else call.proceed()


def know_the_rings(call: Call) -> Any:
    """Note in a rank of a ViCO model where its messages are."""
    from lmdeploy_vico.adapter.engine.ranks import runs_vico
    from lmdeploy_vico.adapter.engine.ring import know_rings

    if runs_vico(call['model_config']):
        know_rings(call['comm_buf_name'], call['ret_buf_name'])
    return call.proceed()


def close_when_nobody_writes(call: Call) -> None:
    """Close a ring of a ViCO model when the thread that sends has given up."""
    from lmdeploy_vico.adapter.engine.ring import close_ring, is_known

    if is_known(call.instance):
        close_ring(call.instance, call.proceed)
    else:
        call.proceed()


def cut_without_copies(call: Call) -> Any:
    """Cut a message into packages without copying the rest of it for each."""
    from lmdeploy_vico.adapter.engine.ring import is_known, packages

    if not is_known(call.instance):
        return call.proceed()
    return packages(call.instance, call['data'], call['receiver_mask'])


def collect_without_copies(call: Call) -> Any:
    """Begin a message in memory that grows in place."""
    from lmdeploy_vico.adapter.engine.ring import is_known

    data, *rest = call.proceed()
    return (bytearray(data) if is_known(call.instance) else data, *rest)


async def call_ranks_beside_the_loop(call: Call) -> Any:
    """Send the visual tokens of a step in a thread."""
    from lmdeploy_vico.adapter.engine.ranks import runs_vico
    from lmdeploy_vico.adapter.engine.ring import call_ranks

    if not runs_vico(call.instance.model_config):
        return await call.proceed()
    message = {'method': call['method'], 'args': call['args'] or [], 'kwargs': call['kwargs'] or {}}
    return await call_ranks(call.instance, {**message, 'return_mask': call['return_mask']}, call['receiver_mask'])


def wait_for_the_ring(call: Call) -> Any:
    """Let a thread finish what it sends to a ViCO model's ranks before the loop sends something."""
    from lmdeploy_vico.adapter.engine.ranks import runs_vico
    from lmdeploy_vico.adapter.engine.ring import lock_of

    if not runs_vico(call.instance.model_config):
        return call.proceed()
    with lock_of(call.instance.comm_buf):
        return call.proceed()


_RING_COPIES = (
    'LMDeploy copies what is left of a message for each of its packages, and on the other side what has come.'
)

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
        end_rank_with_its_steps,
        f'{_WORKER}.start',
        '(self)',
        why='In a rank of the mp executor nobody awaits what computes the steps. When one fails, for want of memory, '
        'the process lives on, and the engine waits for its outputs for ever.',
        until='LMDeploy awaits them, or its mp executor is gone.',
        process='engine',
        uses={
            'lmdeploy.pytorch.engine.executor.mp_executor:MPWorkerWrapper.__init__': '(self, model_path, cache_config, '
            'backend_config, model_config, dist_config, misc_config, specdecode_config=None, adapters=None, '
            "device_type='cuda', log_level=30, trust_remote_code=False)",
            'lmdeploy.pytorch.engine.model_agent.agent:BaseModelAgent.wait_tasks': '(self)',
        },
    ),
    Patch(
        end_rank_with_its_calls,
        f'{_RANK}._task_wrapper',
        '(func, args, kwargs, need_return, ret_buf)',
        why='as the one before, of the calls of the engine that wait',
        until='as the one before',
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
    Patch(
        send_beside_the_loop,
        f'{_RAY}.forward_async',
        '(self, inputs)',
        why="LMDeploy copies a prompt's visual tokens in the engine's loop, which serves nobody meanwhile.",
        until='LMDeploy puts them into the store beside its loop.',
        process='engine',
    ),
    Patch(
        know_the_rings,
        *RANK_LOOP,
        why='A ring does not know whose it is.',
        until='as the next one',
        process='engine',
    ),
    Patch(
        cut_without_copies,
        f'{_RING}.pack_data',
        '(self, data, receiver_mask)',
        why=_RING_COPIES,
        until='LMDeploy copies a message once, or its mp executor is gone.',
        process='engine',
        uses={f'{_RING}.acquire_buf': '(self)', f'{_RING}.name': '(self)'},
    ),
    Patch(
        collect_without_copies,
        f'{_RING}._receive_step0',
        '(self)',
        why=_RING_COPIES,
        until='as the one before',
        process='engine',
        uses={f'{_RING}._receive_step1': '(self, dumped_data, is_receiver, remain_size)'},
    ),
    Patch(
        call_ranks_beside_the_loop,
        f'{_MP}.collective_rpc_async',
        '(self, method, args=None, kwargs=None, receiver_mask=255, return_mask=255)',
        why="LMDeploy sends a prompt's visual tokens in the engine's loop, which serves nobody meanwhile.",
        until='LMDeploy sends beside its loop, or its mp executor is gone.',
        process='engine',
        uses={f'{_RING}.send': '(self, data, receiver_mask=255)', f'{_RING}.receive_async': '(self)'},
    ),
    Patch(
        close_when_nobody_writes,
        f'{_RING}.close',
        '(self)',
        why='A thread that sends goes on when the loop has ended: a ring that it writes to could not be closed.',
        until='as the one before',
        process='engine',
        uses={f'{_NOTIFIER}.close': '(self)'},
    ),
    Patch(
        wait_for_the_ring,
        f'{_MP}.collective_rpc',
        '(self, method, args=None, kwargs=None, receiver_mask=255, return_mask=255)',
        why='Two threads may not write to a ring at once.',
        until='as the one before',
        process='engine',
    ),
)
