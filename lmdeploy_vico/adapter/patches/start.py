"""Changes that keep the start of LMDeploy's engine from failing by chance on a busy host.

Each of them closes a race between LMDeploy's processes and changes nothing else. They take effect for every model, on
every device, also with ``LMDEPLOY_VICO=cpu``.
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
