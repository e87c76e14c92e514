"""What can end LMDeploy's engine while it starts on a busy host, on any device and whatever the model.

These hooks are attached wherever the plugin is, also with ``LMDEPLOY_VICO=cpu``. For a model that is not a ViCO
checkpoint, as for one that is, they change nothing but this: a start that used to fail by chance goes on.
"""

import contextlib
import socket
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lmdeploy_vico.cpu.hooks import wrap_once
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


def outlive_the_manager(module: ModuleType) -> None:
    """Keep the engine process alive when the server closes their shared condition a moment too early.

    Why: the engine process publishes its port under the lock of a condition that a third process manages, and the
    server shuts that process down as soon as it holds the lock. On a busy host the manager is gone before it has
    answered the engine process's release, which dies of an EOFError; the server then ends with an RPCServerDeadError.
    Can go when ``ZMQMPEngine._start_mp_proc`` waits for the answer, or ``_mp_proc`` expects none.
    """

    def mp_proc(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(shared_dict: Any, condition: Any, *args: Any, **kwargs: Any) -> None:
            original(shared_dict, LastRelease(condition), *args, **kwargs)

        return wrapper

    wrap_once(module.ZMQMPEngine, '_mp_proc', mp_proc)


def hold_master_port(module: ModuleType) -> None:
    """Keep the port on which a tensor-parallel group will meet until its first worker listens there.

    Why: LMDeploy's executors look for a free port, let it go and only then start their workers, which takes them
    seconds on a quiet host; meanwhile any connection of any program may be given that port, and the group does not come
    up. Held on this machine only, as it is looked for on this machine only. Can go when ``find_available_port`` keeps
    what it has found.
    """
    wrap_once(module, 'find_available_port', lambda original: lambda: hold_free_port())


def hold_free_port() -> int:
    """A TCP port, free on all addresses, that no program is given by chance as long as this process lives."""
    holder = hold_port('')
    _held.append(holder)
    return int(holder.getsockname()[1])


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    'lmdeploy.pytorch.engine.mp_engine.zmq_engine': outlive_the_manager,
    'lmdeploy.pytorch.engine.executor.mp_executor': hold_master_port,
    'lmdeploy.pytorch.engine.executor.ray_executor': hold_master_port,
}
