"""Images and videos that clients name by ids of their own, so that they need not send them again."""

import threading
from collections import OrderedDict

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.wording import shown

ENTRY = 1024  # bytes that an entry takes beside its data: its keys, and what Python needs


class MediaStore:
    """Keeps encoded images and videos as they were sent or fetched. Safe to use from several threads.

    Those used least recently are dropped first, whoever sent them.

    Args:
        capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0

    @property
    def taken(self) -> int:
        """Bytes that are kept."""
        return self._bytes

    def put(self, client: str, uuid: str, data: bytes) -> None:
        """Keep ``data`` for a client, in the place of what it sent with the same ``uuid`` before.

        Args:
            client: who may ask for it: a name of the API key, empty for all clients without one.
            uuid: the client's name for it.
            data: encoded; not kept if it alone exceeds the capacity.
        """
        size = len(data) + ENTRY
        with self._lock:
            self._drop((client, uuid))
            if size > self.capacity:
                return
            while self._bytes + size > self.capacity:
                self._drop(next(iter(self._kept)))
            self._kept[client, uuid] = data
            self._bytes += size

    def get(self, client: str, uuid: str) -> bytes | None:
        """What the client sent as ``uuid``; None if it has not, or if it is no longer kept."""
        with self._lock:
            data = self._kept.get((client, uuid))
            if data is not None:
                self._kept.move_to_end((client, uuid))
            return data

    def recall(self, client: str, uuid: str) -> bytes:
        """What the client sent as ``uuid``.

        Raises:
            MediaError: it has not, or it is no longer kept.
        """
        data = self.get(client, uuid)
        if data is None:
            raise MediaError(f'No image or video is kept as uuid {shown(uuid)}, or no longer: send it with its "url".')
        return data

    def _drop(self, key: tuple[str, str]) -> None:
        data = self._kept.pop(key, None)
        if data is not None:
            self._bytes -= len(data) + ENTRY
