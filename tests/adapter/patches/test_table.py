"""Every patch against the installed LMDeploy."""

import ast
import re
from pathlib import Path

import lmdeploy.pytorch.configurations
import lmdeploy.vl.model.builder  # noqa: F401 (as LMDeploy does, which finds our classes through the patches)
import pytest

from lmdeploy_vico.adapter.engine.model_config import VicoModelConfigBuilder
from lmdeploy_vico.adapter.patches.table import all_patches, is_supported, supported_range
from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel
from lmdeploy_vico.patching import PatchError, Trigger, check, register

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / 'lmdeploy_vico'


# Those of TurboMind's own module, which needs a driver: tests/adapter/server/turbomind/test_binding.py.
LOADABLE = [patch for patch in all_patches() if patch.trigger is not Trigger.TURBOMIND]


@pytest.mark.parametrize('patch', LOADABLE, ids=str)
def test_a_patch_fits_the_installed_lmdeploy(patch):
    check(patch)


def test_private_names_that_our_code_uses_are_in_the_register():
    """So that the test above sees them vanish."""
    # What LMDeploy's objects get from their __init__.
    instances = {'_required_checker', '_event_id', '_handle', '_proc', '_vocab_size', '_grammar_compiler'}
    listed = {
        name.rpartition(':')[2].rpartition('.')[2] for patch in all_patches() for name in (patch.target, *patch.uses)
    }
    used, ours = set(), set()
    for file in (path for room in ('adapter', 'cpu') for path in (PACKAGE / room).rglob('*.py')):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.Attribute(value=ast.Name(id='self' | 'cls'), attr=name):
                    ours.add(name)
                case ast.Attribute(attr=name) if name.startswith('_') and not name.startswith('__'):
                    used.add(name)
                case ast.ImportFrom(module=str(module), names=names) if module.startswith('lmdeploy.'):
                    used |= {each.name for each in names if each.name.startswith('_')}
    private = used - ours - instances - {'_C', '_private', '_exit', '_getters'}  # of torch, Ray, os and asyncio
    assert {'_get_module_map', '_class_from_qualname', '_update_torch_dtype'} <= private
    assert private <= listed


def test_no_vico_model_starts_without_every_patch(monkeypatch):
    monkeypatch.setitem(register.failed, all_patches()[0], 'signature changed')
    with pytest.raises(PatchError, match='answer batch size.*signature changed'):
        VicoVisionModel.start(None, backend_config=None)
    with pytest.raises(PatchError, match='answer batch size.*signature changed'):
        VicoModelConfigBuilder.build(None)


def test_no_two_patches_are_alike():
    assert len({str(patch) for patch in all_patches()}) == len(all_patches())


@pytest.mark.parametrize(
    'version, supported',
    [('0.18.0', True), ('0.18.3rc1', True), ('0.17.9', False), ('0.19.0', False), ('1.18.0', False), ('0.18', True)],
)
def test_supported_versions(version, supported):
    assert is_supported(version) == supported


def test_the_package_depends_on_the_supported_versions():
    project = (ROOT / 'pyproject.toml').read_text()
    assert re.findall(r'"lmdeploy([<>=!~].*)"', project) == [supported_range().replace(' ', '')]
