"""The public names, and the examples of docs/api.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmdeploy_vico

PAGE = Path(__file__).parents[2] / 'docs' / 'api.md'


def test_the_examples_run(make_checkpoint, pictures, tmp_path, monkeypatch):
    (tmp_path / 'DIR').symlink_to(make_checkpoint())
    pictures['coffee'].save(tmp_path / 'photograph.jpg')
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 4
    names = {}
    for example in examples:  # each may use what those above it have made
        exec(compile(example, str(PAGE), 'exec'), names)
    assert names['compressed'].shape == names['scores'].shape


@pytest.mark.parametrize('name', lmdeploy_vico.__all__)
def test_public_names(name):
    assert getattr(lmdeploy_vico, name) is getattr(lmdeploy_vico, name)
    assert name in dir(lmdeploy_vico)
    assert f'`{name}`' in PAGE.read_text()


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'lmdeploy_vico' has no attribute 'VisionStage'"):
        lmdeploy_vico.VisionStage  # noqa: B018


def test_importing_the_package_loads_nothing():
    code = (
        'import sys; before = set(sys.modules); import lmdeploy_vico; '
        'print([m for m in set(sys.modules) - before if m.partition(".")[0] not in sys.stdlib_module_names])'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['lmdeploy_vico']"
