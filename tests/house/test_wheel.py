"""The built wheel works in a fresh environment, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from waiting import HANG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    source = out / 'source'  # a copy: building leaves files behind that a later build would pick up
    source.mkdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('lmdeploy_vico', 'kernels'):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', str(out)]
    subprocess.run([*command, str(source)], check=True, cwd=out)
    [file] = out.glob('*.whl')
    return file


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path for folder in ('lmdeploy_vico', 'kernels') for path in (ROOT / folder).rglob('*.py')]
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith('kernels/'):
            name = f'lmdeploy_vico/{name}'
        assert name in names, f'{name} is missing from the wheel'
    top = {name.split('/')[0] for name in names}
    assert top == {'lmdeploy_vico', next(name for name in top if name.endswith('.dist-info'))}


@pytest.mark.slow
def test_works_outside_the_checkout(wheel, tmp_path, make_checkpoint):
    environment = tmp_path / 'venv'
    venv.create(environment, with_pip=False)
    python = environment / 'bin' / 'python'
    packages = Path(
        subprocess.check_output(
            [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], text=True
        ).strip()
    )
    pip = [sys.executable, '-m', 'pip', '--quiet', 'install', '--no-deps', '--target', str(packages), str(wheel)]
    subprocess.run(pip, check=True)
    # LMDeploy and the rest come from this environment; its .pth files, and so our editable install, are not read there.
    (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    code = f"""
import torch, lmdeploy_vico, lmdeploy_vico.kernels.attention_pool as kernel
from lmdeploy.archs import get_model_arch
from lmdeploy.vl.engine import ImageEncoder
from lmdeploy import PytorchEngineConfig
config = get_model_arch({str(make_checkpoint())!r})[1]
encoder = ImageEncoder({str(make_checkpoint())!r}, 'pytorch', backend_config=PytorchEngineConfig())
print('FOUND', lmdeploy_vico.__file__, kernel.__file__, type(config).__name__, type(encoder.model).__name__)
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'VIRTUAL_ENV'))}
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, cwd='/', env=variables, timeout=HANG)
    assert done.returncode == 0, done.stderr
    package, kernel, config, model = done.stdout.partition('FOUND')[2].split()
    assert package.startswith(str(packages)) and kernel.startswith(str(packages))
    assert (config, model) == ('VicoChatConfig', 'VicoVisionModel')
