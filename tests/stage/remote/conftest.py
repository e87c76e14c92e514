"""Stages whose encoders are elsewhere."""

import pytest
import torch
from stage.remote.fake_cluster import FINGERPRINT, TURN
from stage.stand_in import CONFIG

from lmdeploy_vico.stage.remote import fleet
from lmdeploy_vico.stage.remote.fleet import Quest
from lmdeploy_vico.stage.stage import VisionStage


@pytest.fixture
def stage_on(monkeypatch):
    """``stage_on(cluster, **options)``: a stage whose encoders are in the cluster."""
    monkeypatch.setattr(fleet, 'PERIOD', 0.01)
    stages, clusters, look = [], [], fleet.Fleet.look

    def look_and_tell(worker):
        try:
            look(worker)
        finally:
            with TURN:
                TURN.notify_all()

    monkeypatch.setattr(fleet.Fleet, 'look', look_and_tell)

    def make(cluster, seconds=600.0, config=CONFIG, fingerprint=FINGERPRINT, **options):
        clusters.append(cluster)
        quest = Quest(cluster, fingerprint, config, seconds)
        stages.append(VisionStage([], torch.bfloat16, threads=2, quest=quest, **options))
        return stages[-1]

    yield make
    for encoder in [encoder for cluster in clusters for encoder in getattr(cluster, 'encoders', {}).values()]:
        encoder.open.set()  # a test that fails leaves some held
    for stage in stages:
        stage.close()
