"""What is loaded, and when: each case in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest
from waiting import HANG

from lmdeploy_vico import autoload


def run(code, **environment):
    """Run ``code`` in a fresh interpreter outside the checkout; returns its standard output and error."""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd='/',
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


OUR_MODULES = "sorted(name for name in sys.modules if name.startswith('lmdeploy_vico'))"


def test_import_torch_loads_only_autoload():
    out, err = run(f'import sys, torch; print({OUR_MODULES})')
    assert out == "['lmdeploy_vico', 'lmdeploy_vico.autoload']"
    assert 'lmdeploy' not in err


def test_importing_lmdeploy_loads_no_heavy_module_of_ours():
    out, _ = run(f'import sys, lmdeploy; print({OUR_MODULES})')
    assert "'lmdeploy_vico.adapter.patches.table'" in out
    for module in ('vision', 'stage', 'adapter.server', 'adapter.engine', 'cpu.engine'):
        assert f'lmdeploy_vico.{module}' not in out


SHOW_CLASSES = """
from lmdeploy.archs import get_model_arch
from lmdeploy.vl.model.builder import VISION_MODELS
from lmdeploy.pytorch.configurations import AutoModelConfigBuilder
from lmdeploy.pytorch.models.module_map import CUSTOM_MODULE_MAP
from lmdeploy.vl.engine import ImageEncoder
config = get_model_arch({path!r}, trust_remote_code=False)[1]
match = next(name for name, model in VISION_MODELS.module_dict.items() if model.match(config))
builders = [b for b in AutoModelConfigBuilder._sub_classes if b.__name__ != 'DefaultModelConfigBuilder']
builder = next(b for b in builders if b.condition(config))
print(type(config).__name__, match, builder.__name__, 'VicoQwen3ForCausalLM' in CUSTOM_MODULE_MAP)
"""
OURS = 'VicoChatConfig VicoVisionModel VicoModelConfigBuilder True'


FURTHER = ('lmdeploy.vl.engine', 'lmdeploy.pytorch.models.module_map')


@pytest.mark.slow
@pytest.mark.parametrize(
    'first', ['torch', 'lmdeploy', *(pytest.param(module, marks=pytest.mark.long) for module in FURTHER)]
)
def test_every_import_order(make_checkpoint, first):
    """Ours for a ViCO checkpoint, LMDeploy's for a plain InternVL beside it."""
    show = ''.join(SHOW_CLASSES.format(path=str(make_checkpoint(flash=flash))) for flash in (True, False))
    out, err = run(f'import {first}\n{show}')
    ours, plain = out.splitlines()
    assert ours == OURS
    assert plain.split()[1:3] == ['InternVLVisionModel', 'InternVLModelConfigBuilder']
    assert 'Traceback' not in err


@pytest.mark.slow
@pytest.mark.parametrize('switch', ['0', 'cpu'])
def test_switched_off(make_checkpoint, switch):
    out, _ = run(SHOW_CLASSES.format(path=str(make_checkpoint())), LMDEPLOY_VICO=switch)
    assert out.split()[1:] == ['InternVLVisionModel', 'InternVLModelConfigBuilder', 'False']


@pytest.mark.slow
def test_switched_off_leaves_the_cpu_backend_out_too():
    code = f'import sys, lmdeploy, lmdeploy.pytorch.engine.engine; print({OUR_MODULES})'
    assert run(code, LMDEPLOY_VICO='False')[0] == "['lmdeploy_vico', 'lmdeploy_vico.autoload']"


@pytest.mark.parametrize('word', ['0', 'off', 'False', ' no '])
def test_words_that_switch_off(monkeypatch, word):
    monkeypatch.setenv(autoload.SWITCH, word)
    assert autoload.switch() == '0'


def test_vision_models_are_imported_without_the_engine():
    """A process that serves another model, with TurboMind perhaps, does not need the engine's many modules."""
    code = """
    import sys, lmdeploy.vl.model.builder
    print('lmdeploy_vico.adapter.server.vision_model' in sys.modules,
          [name for name in sys.modules if name.startswith('lmdeploy.pytorch.engine')])
    """
    assert run(code)[0] == 'True []'


def test_unknown_mode_is_named_once():
    _, err = run('import torch', LMDEPLOY_VICO='on')
    assert err.count("LMDEPLOY_VICO='on' is not one of 1, cpu, 0") == 1


@pytest.mark.slow
def test_unsupported_lmdeploy_is_left_alone_with_one_warning(make_checkpoint):
    pretend = """
    import importlib.metadata as metadata
    real = metadata.version
    metadata.version = lambda name: '0.19.1' if name == 'lmdeploy' else real(name)
    """
    out, err = run(textwrap.dedent(pretend) + SHOW_CLASSES.format(path=str(make_checkpoint())))
    assert out.split()[1:] == ['InternVLVisionModel', 'InternVLModelConfigBuilder', 'False']
    assert err.count('lmdeploy-vico supports LMDeploy >= 0.18, < 0.19, but 0.19.1 is installed') == 1


def test_a_failing_plugin_does_not_break_torch():
    out, err = run(
        """
        import sys
        sys.modules['wrapt'] = None
        import torch
        print(torch.ones(1).item())
        """
    )
    assert out == '1.0'
    assert 'could not be set up' in err


@pytest.mark.slow
def test_other_models_are_loaded_by_lmdeploy():
    code = """
    import sys
    from lmdeploy.hf_configs import config_from_pretrained
    try:
        config_from_pretrained(pretrained_model_name_or_path='/nothing')
    except OSError:
        print('LMDeploy says that there is no config')
    """
    assert run(code)[0] == 'LMDeploy says that there is no config'


@pytest.mark.slow
def test_converted_turbomind_models_need_no_config(tmp_path):
    (tmp_path / 'triton_models').mkdir()
    code = f"""
    from lmdeploy.turbomind.supported_models import is_supported
    from lmdeploy_vico.cpu import selection
    selection.has_cuda = lambda: True
    print(is_supported({str(tmp_path)!r}))
    """
    assert run(code)[0] == 'True'


@pytest.mark.slow
def test_setting_up_twice_changes_nothing(make_checkpoint):
    out, _ = run(
        """
        import importlib, sys
        from lmdeploy_vico.adapter.patches.table import all_patches, can_be_checked, set_up
        from lmdeploy_vico.cpu import engine
        from lmdeploy_vico.patching import Trigger, register

        def state():
            found = {}
            for name, module in sorted(sys.modules.items()):
                if name.startswith(('lmdeploy.', 'PIL.')):
                    for key, value in vars(module).items():
                        found[name, key] = (id(value), list(value) if isinstance(value, dict | list) else None)
                        if isinstance(value, type):
                            found |= {(name, key, n): id(v) for n, v in vars(value).items() if callable(v)}
            return found

        def begin():
            set_up()
            register.apply(Trigger.MODEL)
            engine.install()

        here = [patch for patch in all_patches() if can_be_checked(patch)]
        for patch in here:
            importlib.import_module(patch.module)
        begin()
        before = state()
        begin()
        pending = [patch for patch in register.pending if patch in here]
        print(before == state(), set(register.applied) == set(here), pending, register.failed)
        """
    )
    assert out == 'True True [] {}'
