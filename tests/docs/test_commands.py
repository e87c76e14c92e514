"""Every command in the documents has arguments that exist, and is run by a test, or the document says why it is not.

What no test can run, for want of a published checkpoint, a GPU, other machines or somebody's data, is marked with a
comment, ``# needs ...``, on its line or above it in its block.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from upstream import lmdeploys_parser

from lmdeploy_vico import cli
from lmdeploy_vico.options import PREFIX, Options

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
# Which test runs a command, with arguments of its own in the place of DIR and the like.
RUN_BY = {
    'lmdeploy serve api_server': ('lmdeploy_vico/launch.py', "'serve', 'api_server'"),
    'lmdeploy-vico bench': ('tests/bench/test_first_token.py', "main(['bench'"),
    'lmdeploy-vico calibrate': ('tests/inspection/test_calibrate.py', "['calibrate'"),
    'lmdeploy-vico demo': ('tests/cli/test_cli.py', "main(['demo'"),
    'lmdeploy-vico documents': ('tests/reader/documents/test_export.py', "'documents'"),
    'lmdeploy-vico encoder': ('tests/stage/remote/test_ray.py', "'encoder'"),
    'lmdeploy-vico env': ('tests/cli/test_cli.py', "main(['env'"),
    'lmdeploy-vico eval': ('tests/evaluation/test_command.py', "main(['eval'"),
    'lmdeploy-vico plan': ('tests/planning/test_command.py', "['plan'"),
    'lmdeploy-vico reader': ('tests/reader/test_shipped.py', "'reader'"),
    'lmdeploy-vico route': ('tests/inspection/test_route.py', "main(['route'"),
    'lmdeploy-vico tiny': ('tests/cli/test_cli.py', "main(['tiny'"),
    'lmdeploy-vico train': ('tests/training/runs.py', "['train'"),
    'cp docs/deploy': ('tests/system/balancer.py', 'haproxy.cfg'),
    'haproxy -c': ('tests/system/balancer.py', "'haproxy'"),
    'pip install': ('tests/house/test_wheel.py', "'pip'"),
    'make demo': ('tests/cli/test_cli.py', "main(['demo'"),  # all that it does
    'make test': ('.ci/run', 'make lint test'),
    'make bench-check': ('tests/benchmarks/test_check.py', 'check.main('),  # all that it does
    'benchmarks/on_gpu.sh --help': ('tests/benchmarks/test_on_gpu.py', 'on_gpu'),
}
# What no test has, by what a command has in it.
NEEDS = {
    r'InternVL3_5': 'a published checkpoint',
    r'(DocVQA|ChartQA|MME|docvqa)': 'a data set',
    r'(run\.py|lmms_eval)': 'another program',
    r'on_gpu\.sh(?! --help)': 'a GPU',
    r'nproc-per-node [2-9]': 'several GPUs',
    r'^(ray |export RAY_)': 'other machines',
    r'^(apt-get|systemctl) ': 'Debian',
}
SHELL = re.compile(r'(\w+=\S+ )*(lmdeploy|lmdeploy-vico|make|pip|python|ray|torchrun|export|docker|git|curl) ')
MARK = re.compile(r'#.*\bneeds? ')


def blocks(language):
    for document in DOCUMENTS:
        for named, block in BLOCK.findall(document.read_text()):
            if named == language:
                yield document, block.splitlines()


def lines():
    """Each command line, and whether a mark stands on it or above it in its block."""
    for document, block in blocks('bash'):
        marked = False
        for line in block:
            if line.lstrip().startswith('#'):
                marked = marked or bool(MARK.search(line))
            elif line.strip():
                here = marked or bool(MARK.search(line))
                yield pytest.param(line, here, id=f'{document.stem}: {line.partition("#")[0].strip()[:80]}')


def words_of(line):
    """The variables that a command line sets, and its words."""
    words = shlex.split(line, comments=True)
    if words[:1] == ['export']:
        words.pop(0)
    count = next((index for index, word in enumerate(words) if not re.match(r'[A-Z_]+=', word)), len(words))
    return dict(word.split('=', 1) for word in words[:count]), words[count:]


@pytest.fixture(scope='module')
def serve_parser():
    return lmdeploys_parser()


def parses(argv):
    """Let the command line ``argv`` be parsed, and nothing be run."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, '--help'])
    assert stop.value.code == 0
    cli.parser().parse_args(argv)


def check_arguments(words, serve_parser):
    match words:
        case ['make', target, *arguments]:
            command = ['make', '-n', '-o', '.venv/.installed', target, *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        case ['lmdeploy', *arguments]:
            assert serve_parser.parse_args(arguments).model_path
        case ['lmdeploy-vico', *arguments] | ['torchrun', '--nproc-per-node', _, '-m', 'lmdeploy_vico.cli', *arguments]:
            parses(arguments)
        case ['python' | '.venv/bin/python', '-m', 'benchmarks', *arguments]:
            name = [word for word in arguments if not word.startswith('-')][:1]
            subprocess.run([sys.executable, '-m', 'benchmarks', *name, '--help'], cwd=ROOT, check=True)
        case ['benchmarks/on_gpu.sh', *arguments]:
            done = subprocess.run([ROOT / 'benchmarks/on_gpu.sh', '--help'], capture_output=True, text=True, check=True)
            assert all(argument in done.stdout for argument in arguments)


@pytest.mark.parametrize('line, marked', list(lines()))
def test_a_command_has_arguments_that_exist(line, marked, serve_parser):
    variables, words = words_of(line)
    Options.load({}, {name: value for name, value in variables.items() if name.startswith(PREFIX)})
    check_arguments(words, serve_parser)


@pytest.mark.parametrize('line, marked', list(lines()))
def test_a_command_is_run_by_a_test_or_marked(line, marked):
    _, words = words_of(line)
    needed = [what for pattern, what in NEEDS.items() if re.search(pattern, line.partition('#')[0].strip())]
    if needed:
        assert marked, f'no "# needs {" and ".join(needed)}" beside or above: {line}'
        return
    command = ' '.join(words)
    known = any(re.match(rf'{re.escape(name)}(?![\w-])', command) for name in RUN_BY)
    assert not words or known, f'no test runs it, and nothing marks it: {line}'


@pytest.mark.parametrize('file, words', RUN_BY.values(), ids=RUN_BY)
def test_what_runs_a_command_names_it(file, words):
    assert words in (ROOT / file).read_text()


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_commands_stand_in_blocks_of_their_own(document):
    """A block without a language is not looked at here, so no command may hide in it."""
    for language, block in BLOCK.findall(document.read_text()):
        assert language in ('', 'bash', 'json', 'python', 'yaml')
        hidden = [line for line in block.splitlines() if language == '' and SHELL.match(line)]
        assert not hidden, f'```bash is missing before: {hidden[0]}'
