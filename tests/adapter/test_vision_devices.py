import pytest
import torch

from lmdeploy_vico.adapter.vision_model import vision_devices
from lmdeploy_vico.options import OptionError


@pytest.fixture(autouse=True)
def three_devices(monkeypatch):
    names = ['H200', 'H200', 'L40S']
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(names))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: names[device.index or 0])


@pytest.mark.parametrize(
    'option, devices',
    [('auto', [None]), ('cpu', ['cpu']), ('cuda:1', ['cuda:1']), ('cuda:0, cuda:1', ['cuda:0', 'cuda:1'])],
)
def test_named(option, devices):
    assert vision_devices(option) == [device and torch.device(device) for device in devices]


@pytest.mark.parametrize(
    'option, message',
    [
        ('cuda:3', "'cuda:3' is not a device of this machine"),
        ('gpu', "'gpu' is not a device of this machine"),
        ('', "'' is not a device of this machine"),
        ('meta', "'meta' is not a device of this machine"),
        ('cuda:0,cuda:2', 'several devices must be of one kind, not '),
        ('cuda:0,cpu', 'several devices must be of one kind, not '),
        ('cuda,cuda:0', 'names a device twice'),
        ('cpu,cpu', 'names a device twice'),
    ],
)
def test_refused(option, message):
    with pytest.raises(OptionError, match=message):
        vision_devices(option)
