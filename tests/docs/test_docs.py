"""The documents say what is there: links lead somewhere, examples are Python, the tree is the repository's."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'CHANGELOG.md',
    *sorted((ROOT / 'docs').rglob('*.md')),
]
LINK = re.compile(r'\[[^]]*\]\(([^)\s]+)\)')
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)


def read(document):
    return document.read_text()


def anchors(document):
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r'^#+ (.+)$', read(document), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in LINK.findall(read(document)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f'{document.name}: {link}'
        assert not anchor or anchor in anchors(target), f'{document.name}: {link}'


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_examples_are_python(document):
    for language, block in BLOCK.findall(read(document)):
        if language == 'python':
            ast.parse(block)


def test_readme_is_short():
    assert len(read(ROOT / 'README.md').splitlines()) <= 150


def test_tree_is_the_repositorys():
    """What the README's tree names exists, and it names every folder of the package and of the top level."""
    tree = re.search(r'## Tree\n\n```\n(.*?)```', read(ROOT / 'README.md'), re.DOTALL)[1]
    named, parents = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r'((?:[\w.]+/?)(?:, [\w.]+/?)*)', line.strip())[1].split(', ')
        parents[depth:] = [names[0]]
        named |= {''.join(parents[:depth]) + name for name in names}
    for name in named:
        assert (ROOT / name).exists(), name
    tracked = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {f'{Path(file).parts[0]}/' for file in tracked.split() if len(Path(file).parts) > 1}
    folders |= {'/'.join(Path(file).parts[:2]) + '/' for file in tracked.split() if file.startswith('lmdeploy_vico/')}
    folders = {folder for folder in folders if not folder.endswith('.py/')}
    assert folders <= named
