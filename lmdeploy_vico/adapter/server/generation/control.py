"""The endpoints by which an engine is put to sleep and given other weights, closed unless the operator opens them."""

from typing import Any, NoReturn

from lmdeploy.pytorch.engine.mp_engine.base import MPEngine

from lmdeploy_vico.adapter.server.generation.endpoints import unsupported
from lmdeploy_vico.adapter.server.lifecycle.state import lifecycle

LIFE = ('sleep', 'wakeup')  # methods of LMDeploy's AsyncEngine
WEIGHTS = (  # methods of the engine that it holds
    'update_params',
    'update_weights_from_ipc',
    'init_weights_update_group',
    'update_weights_from_distributed',
    'destroy_weights_update_group',
)


def close_control(engine: Any) -> None:
    """Refuse what clients ask of these methods.

    An engine of a program that is no server has no clients, and one that was started without weights
    (``--empty-init``) is of no use without these methods; both are left as they are.

    Args:
        engine: LMDeploy's AsyncEngine, complete.
    """
    served = isinstance(engine.engine, MPEngine) or lifecycle() is not None  # TurboMind runs in the server's process
    if not served or engine.backend_config.empty_init:
        return
    # Take the place of methods, for this engine only.
    for owner, names in ((engine, LIFE), (engine.engine, WEIGHTS)):
        for name in names:
            setattr(owner, name, _refuse)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise unsupported('Clients of this server do not control its engine (option control_endpoints).')
