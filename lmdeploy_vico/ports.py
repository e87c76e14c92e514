"""TCP ports that stay free until the program they are meant for comes to them."""

import socket


def hold_port(address: str) -> socket.socket:
    """A socket bound to a free port of ``address``, so that no program is given this port by chance.

    Nothing listens there. Whoever asks for the port by its number and for SO_REUSEADDR, as servers and PyTorch's
    TCPStore do, gets it all the same.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((address, 0))
    return holder
