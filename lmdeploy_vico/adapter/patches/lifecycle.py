"""Changes to what LMDeploy does when a process ends: its engine's, its server's."""

import gc
import os
from typing import Any

from lmdeploy_vico.adapter.patches.ranks import RANK_LOOP
from lmdeploy_vico.patching import Call, Patch

_ZMQ = 'lmdeploy.pytorch.engine.mp_engine.zmq_engine:ZMQMPEngine'
_ENGINE_PROCESS = (
    f'{_ZMQ}._mp_proc',
    "(shared_dict, condition, model_path, engine_config=None, log_level='WARNING', speculative_config=None, **kwargs)",
)
_LAST_COLLECTION = (
    'A process that ends has Python look through all objects that are left, a million of them: 1 to 2 s of a core in '
    'which the server has stopped and its supervisor waits. The operating system takes their memory back at once.'
)


def end_when_the_engine_has_died(call: Call) -> None:
    """Refuse requests from then on, and end the server, so that its supervisor starts another."""
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    server = lifecycle()
    if server is not None:
        server.engine_died()
    call.proceed()


def name_the_dead_engine(call: Call) -> None:
    """Make the errors of requests whose engine has died 503 instead of 500."""
    from lmdeploy_vico.adapter.server.lifecycle.state import RETRY_AFTER, lifecycle

    server, code = lifecycle(), call['code']
    if server is not None and server.dead and code == code.INTERNAL_ERROR:
        call.proceed(code=code.ENGINE_UNAVAILABLE, message=server.refusal())
        call.instance.retry_after = RETRY_AFTER
    else:
        call.proceed()


def answer_before_stopping(call: Call) -> None:
    """Give running requests time to end when a signal stops the server, and refuse new ones meanwhile."""
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    server = lifecycle()
    if server is None:
        call.proceed()
    else:
        server.stop(call.instance, call.proceed)


def refuse_at_the_end(call: Call) -> None:
    """Answer 503 while the server takes no requests.

    Attached to a function that every server calls with its application, after its model has been started.
    """
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    call.proceed()
    server = lifecycle()
    if server is not None:
        from lmdeploy_vico.adapter.server.lifecycle.middleware import LifecycleMiddleware

        call['app'].add_middleware(LifecycleMiddleware, lifecycle=server)


def name_requests(call: Call) -> None:
    """Give each request an id, which its answer and the log lines about it carry.

    Attached to a function that every server calls with its application, after its model has been started.
    """
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    call.proceed()
    if lifecycle() is not None:
        from lmdeploy_vico.adapter.server.lifecycle.naming import NamingMiddleware

        call['app'].add_middleware(NamingMiddleware)


def end_with_the_server(call: Call) -> Any:
    """End a process of LMDeploy's when the one that started it has ended."""
    from lmdeploy_vico.adapter.engine.ending import end_with_parent

    end_with_parent()
    return call.proceed()


def end_with_the_launcher(call: Call) -> Any:
    """End a server of a ViCO model when the process that started it for ``--dp`` has ended."""
    from lmdeploy_vico.adapter.hf_config import load_vico_config

    return call.proceed() if load_vico_config(call['model_path']) is None else end_with_the_server(call)


def end_server_at_once(call: Call) -> None:
    """Spare the process of a ViCO model's server Python's last collection, when it has nothing left to do."""
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    try:
        call.proceed()
    finally:
        if lifecycle() is not None:
            gc.freeze()


def end_engine_at_once(call: Call) -> None:
    """Spare the process of a ViCO model's engine Python's last collection, when it has nothing left to do."""
    from lmdeploy_vico.adapter.hf_config import load_vico_config

    # LMDeploy's server and pipeline name a folder; what another program names may be a repository, which is not asked.
    vico = os.path.isdir(call['model_path']) and load_vico_config(call['model_path']) is not None
    try:
        call.proceed()
    finally:
        if vico:
            gc.freeze()


def end_with_the_loop(call: Call) -> Any:
    """End the process of a ViCO model's engine when its main loop has failed."""
    from lmdeploy_vico.adapter.engine.ending import run_engine_loop
    from lmdeploy_vico.adapter.engine.intake import serves_vico

    return run_engine_loop(call.proceed()) if serves_vico(call.instance) else call.proceed()


def bound_the_connections(call: Call) -> None:
    """Take as many connections as there are file descriptors for, and no more."""
    from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

    call.proceed()
    if lifecycle() is not None:
        from lmdeploy_vico.adapter.server.lifecycle.connections import bound_of_this_process, bounded

        config, bound = call.instance, bound_of_this_process()
        config.backlog = min(config.backlog, bound.backlog)
        config.http_protocol_class = bounded(config.http_protocol_class, bound)


PATCHES = (
    Patch(
        end_when_the_engine_has_died,
        f'{_ZMQ}._mark_backend_dead',
        '(self)',
        why='LMDeploy goes on without its engine: /health stays well for up to 12 s, and no supervisor notices.',
        until='LMDeploy ends its server when its engine has died.',
        process='server',
        uses={'lmdeploy.pytorch.engine.mp_engine.zmq_rpc:RPCServerDeadError': None},
    ),
    Patch(
        name_the_dead_engine,
        'lmdeploy.serve.core.exceptions:RequestError.__init__',
        '(self, code, message=None)',
        why='LMDeploy answers 500 to requests whose engine has died under them, as if they were at fault.',
        until='LMDeploy answers 503.',
        process='server',
    ),
    Patch(
        answer_before_stopping,
        'uvicorn.server:Server.handle_exit',
        '(self, sig, frame)',
        why='Without it new connections are refused at once, /health cannot say that the server is about to end, and '
        'requests may run for as long as they like.',
        until='LMDeploy drains its server.',
        process='server',
    ),
    Patch(
        refuse_at_the_end,
        'lmdeploy.serve.openai.api_server:mount_metrics',
        '(app, backend_config)',
        why='LMDeploy takes requests that nobody will answer.',
        until='LMDeploy drains its server.',
        process='server',
    ),
    Patch(
        name_requests,
        'lmdeploy.serve.openai.api_server:mount_metrics',
        '(app, backend_config)',
        why='What a client or proxy has seen of a request cannot be found in the log: LMDeploy logs its own session '
        'numbers, which answers do not tell.',
        until='LMDeploy takes and returns X-Request-Id, and logs it.',
        process='server',
        uses={'lmdeploy.serve.utils.server_utils:protocol_error_response': '(path, error)'},
    ),
    Patch(
        bound_the_connections,
        'uvicorn.config:Config.load',
        '(self)',
        why='Without descriptors the server accepts nobody, and asyncio logs 5 MB of tracebacks a second.',
        until='uvicorn bounds its connections, and LMDeploy sets the bound.',
        process='server',
    ),
    Patch(
        end_with_the_loop,
        'lmdeploy.pytorch.engine.engine:Engine.async_loop',
        '(self)',
        why='The process of an engine whose loop has failed stays, and so does its server, which answers nothing more.',
        until='LMDeploy ends it.',
        process='engine',
    ),
    Patch(
        end_with_the_launcher,
        'lmdeploy.serve.openai.launch_server:_run_server',
        '(gpu_ids, model_path, **kwargs)',
        why='When the process that --dp starts servers from is killed, they stay.',
        until='LMDeploy ends them.',
        process='server',
    ),
    *(
        Patch(
            end_with_the_server,
            target,
            signature,
            why='When a server is killed, its engine and the processes of its tensor-parallel ranks stay, with the '
            "device's memory.",
            until='LMDeploy ends them.',
            process='engine',
        )
        for target, signature in (_ENGINE_PROCESS, RANK_LOOP)
    ),
    Patch(
        end_server_at_once,
        'lmdeploy.cli.serve:SubCliServe.api_server',
        '(args)',
        why=_LAST_COLLECTION,
        until='LMDeploy ends its server so.',
        process='server',
    ),
    Patch(
        end_engine_at_once,
        *_ENGINE_PROCESS,
        why=_LAST_COLLECTION,
        until='LMDeploy ends its engine so.',
        process='engine',
    ),
)
