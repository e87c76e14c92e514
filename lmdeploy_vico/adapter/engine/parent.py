"""Ends this process when the one that started it has ended, however that was."""

import multiprocessing
import os
import threading
from multiprocessing import connection

EXIT_STATUS = 1


def end_with_parent() -> None:
    """Watch the parent process in a thread of its own; does nothing in a process that multiprocessing did not start."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(EXIT_STATUS)  # whatever else it does: nobody would hear of it

    threading.Thread(target=watch, name='vico-parent', daemon=True).start()
