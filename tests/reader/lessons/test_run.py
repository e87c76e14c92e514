"""All lessons in one process, for a few steps: two checkpoints, and a run that goes on."""

import io

import pytest
import torch
from rich.console import Console

from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.reader.documents.page import KINDS
from lmdeploy_vico.reader.lessons import answering, run, seeing
from lmdeploy_vico.reader.lessons.run import School, Steps
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.weights import Tensors
from lmdeploy_vico.training.stages.initialise import read_config

FEW = Steps(seeing.Plan(1, 1), answering.Plan(1, 1, 1), 1)


def teach(path):
    output = io.StringIO()
    School(path, FEW, 0, Processes(), Console(file=output, width=300)).teach()
    return [line.partition(':')[0] for line in output.getvalue().splitlines()]


@pytest.mark.long
@pytest.mark.slow
def test_the_lessons(tmp_path, monkeypatch):
    monkeypatch.setattr(run, 'JUDGED', 1)
    full, compressed = ([f'{count} tokens a tile, {kind}' for kind in KINDS] for count in (256, 64))
    assert teach(tmp_path) == ['seeing', 'answering', 'pages', *full, 'compressing', *compressed]
    plain, vanilla = Tensors(tmp_path / 'plain'), Tensors(tmp_path / 'vanilla')
    config = read_config(tmp_path / 'vanilla')
    vanilla.require(checkpoint_shapes(config))
    assert config['flash_mode'] and 'flash_mode' not in read_config(tmp_path / 'plain')
    assert all(torch.equal(plain.read(name), vanilla.read(name)) for name in plain.shapes)
    kept = torch.load(tmp_path / 'compressing.pt', weights_only=True)
    assert torch.equal(vanilla.read('mlp2.1.weight'), kept['1.weight'].bfloat16()), 'as it is stored'

    first = {name: vanilla.read(name) for name in vanilla.shapes}
    (tmp_path / 'compressing.pt').unlink()
    assert teach(tmp_path) == ['compressing', *compressed], 'what has been learnt is kept'
    again = Tensors(tmp_path / 'vanilla')
    assert all(torch.equal(value, again.read(name)) for name, value in first.items()), 'and nothing depends on luck'
