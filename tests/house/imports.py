"""What the files of the repository import, read from their source: imports within functions count, those for type
checkers do not.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The Python files of package, kernels, benchmarks and tests, by the name under which they are imported.

    ``lmdeploy_vico/kernels`` is a link to ``kernels``, and the folder ``tests`` is on the path.
    """
    homes = {
        'lmdeploy_vico': 'lmdeploy_vico',
        'kernels': 'lmdeploy_vico.kernels',
        'benchmarks': 'benchmarks',
        'tests': '',
    }
    found = {}
    for folder, home in homes.items():
        for path in sorted((root / folder).rglob('*.py')):
            parts = path.relative_to(root / folder).with_suffix('').parts
            if folder == 'lmdeploy_vico' and parts[0] == 'kernels':
                continue
            parts = parts[:-1] if parts[-1] == '__init__' else parts
            name = '.'.join([*home.split('.'), *parts]).strip('.')
            found[f'{folder}.{name}' if name in found else name] = path  # tests/benchmarks stands beside benchmarks
    return found


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted names that the source of ``module`` imports; ``from a import b`` is ``a.b``."""
    package = module if is_package else module.rpartition('.')[0]
    for node in _run(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            origin = '.'.join([*above, *([node.module] if node.module else [])])
            yield from (f'{origin}.{alias.name}' for alias in node.names)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in the body of ``if TYPE_CHECKING:``."""
    yield node
    for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING')
    skipped = node.body if for_checkers else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from _run(child)


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of these modules each imports. A package's own file is only counted where it is what is imported."""
    return {name: arrows(path.read_text(), name, files, path.name == '__init__.py') for name, path in files.items()}


def arrows(source: str, module: str, known: Iterable[str], is_package: bool = False) -> set[str]:
    """The known modules that the source of ``module`` imports, without itself."""
    known = set(known)
    targets = set()
    for name in imported(source, module, is_package):
        while name and name not in known:
            name = name.rpartition('.')[0]
        targets.add(name)
    return targets - {'', module}
