"""What a process that decodes does not get, or gives up at its start, so that files that take it over gain little."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence

# Variables without which Python or a library may not be found, or messages and threads may differ. All others may hold
# what is nobody's business: keys of clients, tokens, addresses.
NAMES = {
    'PATH',
    'LD_LIBRARY_PATH',
    'LD_PRELOAD',
    'LANG',
    'PYTHONHOME',
    'PYTHONPYCACHEPREFIX',
    'PYTHONDONTWRITEBYTECODE',
}
PREFIXES = ('LC_', 'OPENCV_')
# One thread each: decoding takes no more of NumPy's, and only a process with a single thread may leave a namespace.
SETTINGS = {'OPENCV_FFMPEG_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
CAPABILITY_VERSION = 0x20080522  # the third, of 64 bits


def environment(variables: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """The variables of a process that decodes.

    Args:
        variables: those of the server.
        path: where the server finds modules: the process finds them there too.
    """
    kept = {name: value for name, value in variables.items() if name in NAMES or name.startswith(PREFIXES)}
    return {**SETTINGS, **kept, 'PYTHONPATH': os.pathsep.join(directory for directory in path if directory)}


def confine() -> None:
    """Gain no privileges any more, and give up the network, where the kernel allows that.

    Many kernels and containers do not, and a process decodes all the same. It must have one thread.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not os.geteuid():
        # In a namespace of users of its own, root could not read libraries in the directories of other users.
        libc.unshare(CLONE_NEWNET)
    elif libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:
        # Whoever makes a namespace has all capabilities in it, which opens more of the kernel.
        libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def end_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it has ended.

    After :func:`confine`: the kernel may forget this where a process changes what it may do.

    Args:
        parent: the number of the process that started this one.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit()
