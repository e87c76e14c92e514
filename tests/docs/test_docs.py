"""The documents say what is there: links lead somewhere, commands exist, the tree is the repository's."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_vico import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'CHANGELOG.md',
    *sorted((ROOT / 'docs').rglob('*.md')),
]
LINK = re.compile(r'\[[^]]*\]\(([^)\s]+)\)')
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
# What a command line that is not checked here is checked by.
ELSEWHERE = {
    'pip install': 'tests/house/test_wheel.py installs the wheel',
    'pre-commit install': 'its hooks are the commands of make lint',
    'lmdeploy serve api_server': 'tests/serving starts servers, by the same command',
    'apt-get install': 'packages of Debian, which make test-system needs too',
    'cp docs/deploy/': 'tests/system/balancer.py runs HAProxy with these files',
    'haproxy -c': 'tests/system/balancer.py runs HAProxy with this file',
    'systemctl ': 'of systemd, which the tests do not have; tests/docs/test_deploy.py reads the unit',
    'python run.py': 'of VLMEvalKit, which is not installed; the document says so',
    'python -m lmms_eval': 'of lmms-eval, which is not installed; the document says so',
}


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


def commands():
    for document in DOCUMENTS:
        for language, block in BLOCK.findall(read(document)):
            if language == 'bash':
                for line in block.splitlines():
                    yield pytest.param(line, id=f'{document.stem}: {line.partition("#")[0].strip()}')


def parses(argv):
    """Let the command line ``argv`` be parsed, and nothing be run."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, '--help'])
    assert stop.value.code == 0
    cli.parser().parse_args(argv)


@pytest.mark.parametrize('line', list(commands()))
def test_commands_exist(line):
    words = shlex.split(line, comments=True)
    while words and '=' in words[0]:  # variables of the environment
        words.pop(0)
    match words:
        case []:
            return
        case ['make', target, *arguments]:
            done = subprocess.run(
                ['make', '-n', '-o', '.venv/.installed', target, *arguments], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        case ['lmdeploy-vico', *arguments]:
            parses(arguments)
        case ['torchrun', '--nproc-per-node', _, '-m', 'lmdeploy_vico.cli', *arguments]:
            parses(arguments)
        case ['python' | '.venv/bin/python', '-m', 'benchmarks', *arguments]:
            name = [word for word in arguments if not word.startswith('-')][:1]
            subprocess.run([sys.executable, '-m', 'benchmarks', *name, '--help'], cwd=ROOT, check=True)
        case ['benchmarks/on_gpu.sh', *arguments]:
            done = subprocess.run([ROOT / 'benchmarks/on_gpu.sh', '--help'], capture_output=True, text=True, check=True)
            assert all(argument in done.stdout for argument in arguments)
        case _:
            assert any(' '.join(words).startswith(command) for command in ELSEWHERE), f'nothing checks: {line}'


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
