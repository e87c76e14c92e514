"""What a benchmark's results say of where they come from, and the table at the end of a run."""

from rich.console import Console
from rich.table import Table

from benchmarks.lib.facts import facts

# Rows of the table: a title, then for each case its extra_info as the benchmarks fill it in.
COLUMNS = ('operation', 'D', 'tiles', 'median', 'floor', 'times floor', 'of copy bandwidth', 'against')


def pytest_addoption(parser):
    group = parser.getgroup('benchmarks/gates/cases.py')
    group.addoption('--turns', type=int, default=5, help='turns in each round of a case')
    group.addoption('--like', help='size of the ViT, as in benchmarks/lib/models.py')


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(facts())


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, '_benchmarksession', None)
    cases = [bench.extra_info for bench in session.benchmarks if 'competitors' in bench.extra_info] if session else []
    if not cases:
        return
    table = Table(*COLUMNS, title='Kernels: medians; competitors took turns with ours')
    for case in cases:
        ours = case['competitors']['ours']['median']
        others = (name for name in case['competitors'] if name != 'ours')
        table.add_row(
            *(case['operation'], str(case['width']), str(case['tiles']), _duration(ours), _duration(case['floor'])),
            *(f'{ours / case["floor"]:.2f}', f'{case["bandwidth_share"]:.0%}'),
            ', '.join(f'{name} {case["competitors"][name]["median"] / ours:.2f}x' for name in others),
        )
    terminalreporter.write_line('')
    Console(width=150, file=terminalreporter._tw._file).print(table)


def _duration(seconds):
    return f'{seconds * 1e6:.1f} us' if seconds < 1e-3 else f'{seconds * 1e3:.2f} ms'
