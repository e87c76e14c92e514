"""Changes to the start of LMDeploy: it does not fail by chance, and says in a sentence why a server must not start.

Those of ``PATCHES`` close races between LMDeploy's processes and change nothing else. They take effect for every model,
on every device, also with ``LMDEPLOY_VICO=cpu``.
"""

import contextlib
import socket
from typing import Any

from lmdeploy_vico.patching import Call, Patch
from lmdeploy_vico.ports import hold_port

_held: list[socket.socket] = []


class LastRelease:
    """A manager's condition whose lock may be released after the manager has gone."""

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __enter__(self) -> Any:
        return self._condition.__enter__()

    def __exit__(self, *details: Any) -> None:
        # The reply is lost if the waiting process saw the lock free and shut its manager down already.
        with contextlib.suppress(EOFError, OSError):
            self._condition.__exit__(*details)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._condition, name)


def outlive_the_manager(call: Call) -> Any:
    """Keep the engine process alive when the server closes their shared condition a moment too early."""
    return call.proceed(condition=LastRelease(call['condition']))


def hold_master_port(call: Call) -> int:
    """Keep the port on which a tensor-parallel group will meet until its first worker listens there.

    It is held on this machine only, as it is looked for on this machine only.
    """
    del call
    return hold_free_port()


def hold_free_port() -> int:
    """A TCP port, free on all addresses, that no program is given by chance as long as this process lives."""
    holder = hold_port('')
    _held.append(holder)
    return int(holder.getsockname()[1])


def check_options_first(call: Call) -> None:
    """Check the options of a ViCO model before anything is loaded, and say a refusal in a sentence."""
    from lmdeploy_vico.adapter.server.placement.refusal import check_options, in_a_sentence

    arguments = call['args']
    with in_a_sentence(arguments.hf_overrides):
        check_options(arguments.model_path, arguments.hf_overrides)
        call.proceed()


def refuse_in_a_sentence(call: Call) -> None:
    """Say in a sentence why the server of a data-parallel rank, in a process of its own, must not start."""
    from lmdeploy_vico.adapter.server.placement.refusal import in_a_sentence

    with in_a_sentence(getattr(call['backend_config'], 'hf_overrides', None)):
        call.proceed()


PATCHES = (
    Patch(
        outlive_the_manager,
        'lmdeploy.pytorch.engine.mp_engine.zmq_engine:ZMQMPEngine._mp_proc',
        "(shared_dict, condition, model_path, engine_config=None, log_level='WARNING', speculative_config=None, "
        '**kwargs)',
        why='The engine process publishes its port under the lock of a condition that a third process manages, and the '
        'server shuts that process down as soon as it holds the lock. On a busy host the manager is gone before it has '
        "answered the engine process's release, which dies of an EOFError; the server then ends with an "
        'RPCServerDeadError.',
        until='ZMQMPEngine._start_mp_proc waits for the answer, or _mp_proc expects none.',
        process='engine',
    ),
    *(
        Patch(
            hold_master_port,
            f'lmdeploy.pytorch.engine.executor.{executor}:find_available_port',
            '()',
            why="LMDeploy's executors look for a free port, let it go and only then start their workers, which takes "
            'seconds on a quiet host. Meanwhile any connection of any program may be given that port, and the group '
            'does not come up.',
            until='find_available_port keeps what it has found.',
            process='engine',
        )
        for executor in ('mp_executor', 'ray_executor')
    ),
)

# Of the server's process, and without effect on a model that is not a ViCO checkpoint.
SERVER_PATCHES = (
    Patch(
        check_options_first,
        'lmdeploy.cli.serve:SubCliServe.api_server',
        '(args)',
        why='LMDeploy ends with its traceback above the reason, and in a data-parallel server once for each rank.',
        until='LMDeploy lets a plugin check its options, and reports a ValueError in a sentence.',
        process='server',
    ),
    Patch(
        refuse_in_a_sentence,
        'lmdeploy.serve.openai.api_server:serve',
        "(model_path, model_name=None, backend='turbomind', backend_config=None, chat_template_config=None, "
        "server_name='0.0.0.0', server_port=23333, allow_origins=['*'], allow_credentials=True, allow_methods=['*'], "
        "allow_headers=['*'], log_level='ERROR', api_keys=None, ssl=False, proxy_url=None, max_log_len=None, "
        'disable_fastapi_docs=False, max_concurrent_requests=None, trust_remote_code=False, reasoning_parser=None, '
        'tool_call_parser=None, allow_terminate_by_client=False, enable_abort_handling=False, speculative_config=None, '
        "allowed_media_domains=None, generation_config='auto', **kwargs)",
        why='A rank of a data-parallel server starts here, in a process of its own.',
        until='as the one before',
        process='server',
    ),
)
