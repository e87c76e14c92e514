"""What the kernel gives to a program that asks for any port."""

import socket
import struct

import pytest

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
