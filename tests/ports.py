"""Ports that nothing listens on, and what the kernel gives to a program that asks for any."""

import socket
import struct

import pytest

from lmdeploy_vico.ports import hold_port

IP_LOCAL_PORT_RANGE = 51  # linux/in.h, since Linux 6.3


def given_by_chance(port: int) -> bool:
    """Whether the kernel gives ``port`` to a socket that asks for any, when no other is left."""
    with socket.socket() as any_port:
        try:
            any_port.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack('I', port << 16 | port))
        except OSError:
            pytest.skip('needs a Linux that restricts the ports of a socket (6.3)')
        try:
            any_port.bind(('127.0.0.1', 0))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens."""
    with hold_port('127.0.0.1') as holder:
        return int(holder.getsockname()[1])
