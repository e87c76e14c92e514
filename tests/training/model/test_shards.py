"""Of a tensor that is sharded, a process reads no more than its own rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmdeploy_vico.training.model.weights import Tensors, load

SIZE = 3
NAMES = ('vision_model.embeddings.class_embedding', 'mlp1.1.weight', 'mlp1.0.bias')


@pytest.fixture(params=range(SIZE))
def mesh(request):
    """This process is one of three; the others are not there."""
    dist.init_process_group('fake', rank=request.param, world_size=SIZE, store=FakeStore())
    yield init_device_mesh('cpu', (SIZE,))
    dist.destroy_process_group()


@pytest.fixture
def read(monkeypatch):
    """The number of values that are read of each tensor."""
    values = {}

    def counted(method):
        def reading(self, name, *rows):
            tensor = method(self, name, *rows)
            values[name] = tensor.numel()
            return tensor

        return reading

    for method in ('read', 'read_rows'):
        monkeypatch.setattr(Tensors, method, counted(getattr(Tensors, method)))
    return values


def sharded(mesh, stored, placement):
    """A parameter of the shape that is stored."""
    return nn.Parameter(distribute_tensor(torch.zeros_like(stored), mesh, [placement], src_data_rank=None))


def test_each_process_reads_its_rows(dense, mesh, read):
    """Also where there are fewer rows than processes, or their number cannot be divided."""
    tensors = Tensors(dense.path)
    stored = {name: tensors.read(name) for name in NAMES}
    parameters = {name: sharded(mesh, value, Shard(0)) for name, value in stored.items()}
    read.clear()
    load(parameters.items(), tensors)
    for name, parameter in parameters.items():
        expected = distribute_tensor(stored[name], mesh, [Shard(0)], src_data_rank=None).to_local()
        assert torch.equal(parameter.to_local(), expected)
        assert read.get(name, 0) == expected.numel()


def test_what_is_not_sharded_by_rows_is_read_whole(dense, mesh, read):
    tensors = Tensors(dense.path)
    stored = tensors.read('mlp1.1.weight')
    parameter = sharded(mesh, stored, Replicate())
    load([('mlp1.1.weight', parameter)], tensors)
    assert torch.equal(parameter.to_local(), stored)
    assert read['mlp1.1.weight'] == stored.numel()
