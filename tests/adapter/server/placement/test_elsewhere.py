"""Which Ray cluster a server's images are encoded in, and what is refused before it is joined."""

import pytest

from lmdeploy_vico.adapter.server.placement.elsewhere import encoders_elsewhere, ray_address
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.ports import hold_port


@pytest.mark.parametrize(
    ('option', 'address'),
    [
        ('auto', None), ('cpu', None), ('cuda:0,cuda:1', None), ('ray:auto', 'auto'),
        ('ray:10.1.2.3:6379', '10.1.2.3:6379'), ('ray:[fd00::1]:6379', '[fd00::1]:6379'),
    ],
)  # fmt: skip
def test_the_address_is_what_follows(option, address):
    assert ray_address(option) == address


@pytest.mark.parametrize('option', ['ray:', 'ray:head', 'ray:head:', 'ray:auto:x'])
def test_what_is_no_address_is_refused(option):
    with pytest.raises(OptionError, match='is not an address: set it to "ray:auto" or "ray:<host>:<port>"'):
        ray_address(option)


def test_a_cluster_that_is_not_there_is_named(make_checkpoint):
    checkpoint = make_checkpoint()
    config = VicoConfig.from_pretrained(checkpoint)
    with hold_port('127.0.0.1') as held:
        address = f'127.0.0.1:{held.getsockname()[1]}'
        with pytest.raises(OptionError, match=f"vision_device 'ray:{address}': No Ray cluster answers at '{address}'"):
            encoders_elsewhere(str(checkpoint), config, Options(vision_device=f'ray:{address}'), address)


def test_made_up_weights_are_refused(make_checkpoint):
    checkpoint = make_checkpoint()
    options = Options(vision_device='ray:auto', dummy_weights=True)
    with pytest.raises(OptionError, match='dummy_weights are made up in each process'):
        encoders_elsewhere(str(checkpoint), VicoConfig.from_pretrained(checkpoint), options, 'auto')
