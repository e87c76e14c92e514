"""Images and videos that clients name by a "uuid": kept as they were sent, and found again by their name."""

import base64
from pathlib import Path
from typing import Any

from lmdeploy.vl.media.base import MediaIO
from lmdeploy.vl.media.connection import load_from_url

from lmdeploy_vico.adapter.server.items import MediaItem, SyntheticItem
from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.media.store import MediaStore


class _AsDataUrl(MediaIO[str]):
    """In the place of LMDeploy's decoders: what has been fetched, as a data URL."""

    def load_bytes(self, data: bytes) -> str:
        return 'data:application/octet-stream;base64,' + base64.b64encode(data).decode()

    def load_base64(self, media_type: str, data: str) -> str:
        return f'data:{media_type};base64,{data}'

    def load_file(self, filepath: Path) -> str:
        raise NotImplementedError(filepath)  # files are not fetched here


class NamedMedia:
    """What items name by their "uuid". An API key finds what it sent itself; requests without one share theirs.

    Args:
        store: where data URLs are kept.
    """

    def __init__(self, store: MediaStore) -> None:
        self._store = store

    def source(self, item: MediaItem, allowed_media_domains: list[str] | None) -> Any:
        """Where an item is: its own source, or a data URL of what it names.

        What is to be kept is fetched here, once: a server may have something else at the same URL later.

        Raises:
            ValueError: nothing is kept by this name, or the URL cannot be fetched.
        """
        if isinstance(item, SyntheticItem) or item.uuid is None:
            return item.source
        if item.source is None:
            return self._store.recall(_client(), item.uuid).decode()
        if isinstance(item.source, str) and item.source[:4].lower() == 'http' and self._store.capacity:
            return load_from_url(item.source, _AsDataUrl(), allowed_media_domains)
        return item.source

    def keep(self, item: MediaItem, source: Any) -> None:
        """Keep what an item names, which has been decoded. Files of the server are there anyway, and are not kept."""
        if not isinstance(item, SyntheticItem) and item.uuid and isinstance(source, str) and source[:5] == 'data:':
            self._store.put(_client(), item.uuid, source.encode())


def _client() -> str:
    served = served_request()
    return served.key if served else ''
