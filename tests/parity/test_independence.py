"""The oracle shares no code with what it judges."""

import ast
from pathlib import Path

import pytest


@pytest.mark.parametrize('file', ['reference.py', 'prompts.py'])
def test_the_reference_imports_nothing_of_the_package(file):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or '']
        assert not [name for name in names if name.startswith(('lmdeploy', 'kernels'))]
