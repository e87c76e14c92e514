"""What tests of an engine's process share."""

import pytest

from lmdeploy_vico.adapter.engine import ending


@pytest.fixture
def ended(monkeypatch):
    """With what statuses the process of an engine, which LMDeploy has started, was ended."""
    statuses = []
    monkeypatch.setattr(ending.os, '_exit', statuses.append)
    monkeypatch.setattr(ending, '_started_by_lmdeploy', [True])
    return statuses
