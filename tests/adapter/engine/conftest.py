"""What tests of an engine's process share."""

import pytest

from lmdeploy_vico.adapter.engine import ending


@pytest.fixture
def ended(monkeypatch):
    """With what statuses the process of an engine, which multiprocessing has started, was ended."""
    statuses = []
    monkeypatch.setattr(ending.os, '_exit', statuses.append)
    monkeypatch.setattr(ending.multiprocessing, 'parent_process', object)
    return statuses
