"""TCP ports that stay free until the program they are meant for comes to them."""

import socket


def hold_port(address: str, port: int = 0) -> socket.socket:
    """A socket bound to a port of ``address``, so that no program is given this port by chance.

    Args:
        address: of this machine.
        port: which one; 0 for any that is free.

    Nothing listens there. Whoever asks for the port by its number and for SO_REUSEADDR, as servers and PyTorch's
    TCPStore do, gets it all the same.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((address, port))
    return holder
