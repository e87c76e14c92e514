"""Encoders as actors of a Ray cluster.

An encoder is a named, detached actor. Its namespace says which checkpoint it serves, so that servers of several
checkpoints may use one cluster and none has to ask strangers.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.remote.channel import Channel

AUTO = 'auto'
NAMESPACE = 'lmdeploy-vico-'  # followed by a fingerprint
HEALTH = 'health'  # the concurrency group of signs of life, which no batch holds up


class ClusterError(RuntimeError):
    """The cluster cannot be joined, or must not be; the message says what to do."""


class RayAnswer:
    """An :class:`~lmdeploy_vico.stage.remote.channel.Answer` on its way through Ray's object store."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def ready(self, seconds: float) -> bool:
        """Wait at most so long; return whether the answer, or the failure of the call, is there."""
        return bool(ray.wait([self._reference], timeout=seconds, fetch_local=True)[0])

    def result(self) -> Any:
        """Return the answer; raises EncoderGoneError, or what the call raised."""
        try:
            return ray.get(self._reference)
        except RayTaskError:
            raise
        except RayError as error:  # the actor, its machine, or its answer on the way
            raise EncoderGoneError(_summary(error)) from None


class RayChannel:
    """A :class:`~lmdeploy_vico.stage.remote.channel.Channel` to an actor."""

    def __init__(self, name: str, handle: ActorHandle) -> None:
        self.name, self._handle = name, handle

    def call(self, method: str, *arguments: Any) -> RayAnswer:
        """Call a method of the actor."""
        options = {'concurrency_group': HEALTH} if method == 'hello' else {}
        return RayAnswer(getattr(self._handle, method).options(**options).remote(*arguments))


class RayCluster:
    """The encoders of one checkpoint in a Ray cluster: a :class:`~lmdeploy_vico.stage.remote.channel.Cluster`.

    Args:
        address: of the cluster, as ``ray.init`` takes it.
        fingerprint: of the checkpoint's vision side.

    Raises:
        ClusterError: there is no such cluster.
    """

    def __init__(self, address: str, fingerprint: str) -> None:
        self.name = f'ray:{address}'
        self._namespace = NAMESPACE + fingerprint
        self._joined = join(address)

    def find(self) -> list[Channel]:
        """Return the actors of the checkpoint's namespace."""
        channels: list[Channel] = []
        for name in sorted(names(self._namespace)):
            try:
                channels.append(RayChannel(name, ray.get_actor(name, self._namespace)))
            except ValueError:  # it has just ended
                continue
        return channels

    def others(self) -> list[str]:
        """Return the names of the encoders of other checkpoints, each with its fingerprint."""
        entries = ray.util.list_named_actors(all_namespaces=True)
        return sorted(
            f'{entry["name"]} ({entry["namespace"].removeprefix(NAMESPACE)})'
            for entry in entries
            if entry['namespace'].startswith(NAMESPACE) and entry['namespace'] != self._namespace
        )

    def close(self) -> None:
        """Leave the cluster, unless the program itself had joined it before."""
        if self._joined:
            ray.shutdown()


def _summary(error: RayError) -> str:
    """The line that says what has happened: the last one if the actor could not be made, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if 'creation task' in str(error) else lines[0]) if lines else type(error).__name__


def names(namespace: str) -> list[str]:
    """Return the names of the actors of a namespace."""
    entries = ray.util.list_named_actors(all_namespaces=True)
    return [entry['name'] for entry in entries if entry['namespace'] == namespace]


def join(address: str) -> bool:
    """Join the cluster at an address, unless this process is in one; return whether it was not.

    Raises:
        ClusterError: there is no cluster, or it does not let us in.
    """
    if ray.is_initialized():
        return False
    if address != AUTO:
        require_listener(address)
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f'The Ray cluster at {address} cannot be joined: {" ".join(str(error).split())} On this machine, run '
            '`ray start --head` for a new one, or `ray start --address=HOST:PORT` to join one; with '
            'RAY_AUTH_MODE=token all need the same token.'
        ) from error
    return True


def require_protected(address: str, insecure: bool) -> None:
    """Check that nobody but those who have the token, or are on this machine, can run code in the joined cluster.

    Args:
        address: as the operator has written it.
        insecure: whether the operator takes the risk.

    Raises:
        ClusterError: everybody who reaches a port of the cluster can.
    """
    if insecure or os.environ.get('RAY_AUTH_MODE', '').lower() == 'token':
        return
    hosts = {node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']}
    if beyond := sorted(host for host in hosts if not _is_loopback(host)):
        raise ClusterError(
            f'The Ray cluster at {address} listens on {", ".join(beyond)} without token authentication: whoever '
            'reaches it can run code on all its machines. Start it, this command and the servers with '
            'RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes a token), or say --insecure where nobody else '
            'reaches it.'
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def require_listener(address: str) -> None:
    """Raise ClusterError at once where nothing listens: Ray itself would try for a minute."""
    host, _, port = address.rpartition(':')
    try:
        with socket.create_connection((host.strip('[]'), int(port)), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise ClusterError(
            f'No Ray cluster answers at {address!r} ({error}): give HOST:PORT of its head, as `ray start --head` '
            'prints it.'
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of the program: Ray puts one of its own in place of that for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
