"""Images and videos that clients name by a "uuid": kept as they were sent, and found again by their name."""

from collections.abc import Callable

from lmdeploy_vico.adapter.server.items import ImageItem, VideoItem
from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.media.sources import is_data_url, is_web_url
from lmdeploy_vico.media.store import MediaStore


class NamedMedia:
    """What items name by their "uuid". An API key finds what it sent itself; requests without one share theirs.

    Args:
        store: where files are kept.
    """

    def __init__(self, store: MediaStore) -> None:
        self._store = store

    def source(self, item: ImageItem | VideoItem) -> str | bytes:
        """Where an item is: its own URL, or the file that it names.

        Raises:
            MediaError: nothing is kept by this name.
        """
        if isinstance(item.source, str):
            return item.source
        assert item.source is None and item.uuid is not None
        return self._store.recall(_client(), item.uuid)

    def keep(self, item: ImageItem | VideoItem) -> Callable[[bytes], None] | None:
        """What keeps the file of an item, once it has been decoded; None for an item that has no name.

        Files of the server are there anyway, and are not kept.
        """
        uuid, client, url = item.uuid, _client(), item.source
        if uuid is None or not isinstance(url, str) or not (is_data_url(url) or is_web_url(url)):
            return None
        return lambda data: self._store.put(client, uuid, data)


def _client() -> str:
    served = served_request()
    return served.key if served else ''
