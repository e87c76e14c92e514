"""The register of patches, on modules made for the purpose."""

import importlib
import logging
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
from waiting import HANG

from lmdeploy_vico.cli import main
from lmdeploy_vico.patching import (
    Call,
    MisfitError,
    Patch,
    PatchError,
    Register,
    Target,
    Trigger,
    check,
    module_exists,
)

SOURCE = """
class Greeter:
    def __init__(self, name, mark='!'):
        self.name, self.mark = name, mark

    def greet(self, greeting='hello', *, times=1):
        return f'{greeting} {self.name}{self.mark}' * times

    @staticmethod
    def shout(text):
        return text.upper()

    @classmethod
    def of(cls, name, **others):
        return cls(name, **others)

KINDS = ['plain']
"""


def politely(call: Call) -> str:
    """Greet politely."""
    return call.proceed(greeting=f'good {call["greeting"]}')


def quietly(call: Call) -> str:
    """Do not shout."""
    return call['text'].lower()


def by_surname(call: Call):
    """Make greeters by surname."""
    return call.proceed(name=f'{call["name"]} {call.instance.__name__}')


def put_first(target: Target) -> None:
    """Put our kind first."""
    target.value.insert(0, 'polite')


def entry(change, path, signature=None, **others):
    return Patch(change, f'doctored:{path}', signature, why='a test', until='it ends', process='server', **others)


GREET = entry(politely, 'Greeter.greet', "(self, greeting='hello', *, times=1)")
SHOUT = entry(quietly, 'Greeter.shout', '(text)')
OF = entry(by_surname, 'Greeter.of', '(cls, name, **others)')
KINDS = entry(put_first, 'KINDS')


@pytest.fixture
def doctored(monkeypatch, tmp_path):
    """``doctored(old, new)``: write the module with ``old`` replaced by ``new``, ready to be imported."""

    def write(old='', new='', name='doctored'):
        (tmp_path / f'{name}.py').write_text(SOURCE.replace(old, new) if old else SOURCE)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    # Bytecode is told apart by time and size, which two versions can have in common.
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    write()
    yield write
    sys.modules.pop('doctored', None)


def load():
    return importlib.import_module('doctored')


@pytest.mark.parametrize('early', [False, True])
def test_functions_are_wrapped_and_objects_edited_once(doctored, early):
    if early:
        load()
    register = Register()
    for _ in range(2):
        register.install([GREET, SHOUT, OF, KINDS])
        module = load()
    greeter = module.Greeter('Ada')
    assert greeter.greet('day') == greeter.greet(greeting='day') == module.Greeter.greet(greeter, 'day')
    assert greeter.greet(times=2) == 'good hello Ada!good hello Ada!'
    assert module.Greeter.shout('Hi') == greeter.shout('Hi') == 'hi'
    assert module.Greeter.of('Ada', mark='?').greet() == 'good hello Ada Greeter?'
    assert module.KINDS == ['polite', 'plain']
    assert register.applied == [GREET, SHOUT, OF, KINDS]
    assert not register.pending and not register.failed
    register.require_all()


def test_wrapped_functions_can_be_sent_to_other_processes(doctored):
    Register().install([GREET, SHOUT, OF])
    module = load()
    greet, shout, of = pickle.loads(
        pickle.dumps((module.Greeter('Ada').greet, module.Greeter.shout, module.Greeter.of))
    )
    assert (greet(), shout('Hi'), of('Ada').greet()) == ('good hello Ada!', 'hi', 'good hello Ada Greeter!')


DOCTORED = [
    ('def greet(', 'def welcome(', GREET, 'target missing: doctored has no Greeter.greet'),
    ('class Greeter', 'class Host', GREET, 'target missing: doctored has no Greeter.greet'),
    ('times=1', 'count=1', GREET, r'signature changed: .*, \*, count=1\), expected \(self, .*, \*, times=1\)'),
    ("='hello'", "='hi'", GREET, r"signature changed: .*\(self, greeting='hi', .* expected"),
    ('shout(text)', 'shout(text, louder=False)', SHOUT, r'is \(text, louder=False\), expected \(text\)'),
    ('KINDS', 'SORTS', KINDS, 'target missing: doctored has no KINDS'),
]


@pytest.mark.parametrize('old, new, patch, reason', DOCTORED)
def test_what_does_not_fit_is_named(doctored, caplog, old, new, patch, reason):
    """In a process that serves no ViCO model, the log names it once; in one that does, the start raises."""
    check(patch)
    sys.modules.pop('doctored')
    doctored(old, new)
    with pytest.raises(MisfitError, match=reason):
        check(patch)
    sys.modules.pop('doctored')
    register = Register()
    register.install([patch])
    with caplog.at_level(logging.ERROR):
        load()
        register.install([patch])
    [record] = caplog.records
    assert str(patch) in record.getMessage() and list(register.failed) == [patch]
    with pytest.raises(PatchError, match=reason) as caught:
        register.require_all()
    assert str(patch) in str(caught.value) and 'lmdeploy-vico env --patches' in str(caught.value)


def test_names_that_a_patch_uses_are_checked(doctored):
    patch = entry(put_first, 'KINDS', uses={'doctored:Greeter.shout': '(text)'})
    check(patch)
    sys.modules.pop('doctored')
    doctored('shout(text)', 'shout(words)')
    with pytest.raises(MisfitError, match=r'doctored:Greeter.shout is \(words\), expected \(text\)'):
        check(patch)


def test_names_of_other_modules_that_a_patch_uses_are_checked_but_not_where_it_is_made(doctored, tmp_path):
    (tmp_path / 'another.py').write_text('def shout(words):\n    return words')
    patch = entry(put_first, 'KINDS', uses={'another:shout': '(text)'})
    with pytest.raises(MisfitError, match=r'another:shout is \(words\), expected \(text\)'):
        check(patch)
    del sys.modules['another']
    register = Register()
    register.install([patch])
    load()
    assert register.applied == [patch] and 'another' not in sys.modules


def test_modules_that_are_not_imported_must_exist(doctored):
    """A module of another process is left alone; one that has vanished is an error before it is missed."""
    register = Register()
    register.install([GREET])
    register.require_all()
    assert 'doctored' not in sys.modules
    gone = Patch(put_first, 'lmdeploy.vl.gone:KINDS', why='a test', until='it ends', process='server')
    register.install([gone])
    with pytest.raises(PatchError, match=r'"put first" \(lmdeploy.vl.gone:KINDS\): target missing: there is no module'):
        register.require_all()


def test_a_model_is_served_a_later_import_raises(doctored):
    doctored('def greet(', 'def welcome(')
    register = Register()
    register.install([GREET])
    register.require_all()
    with pytest.raises(PatchError, match='politely'):
        load()


def test_other_errors_of_a_patch_are_failures_too(doctored):
    def fail(target):
        raise KeyError('kind')

    patch = entry(fail, 'KINDS', trigger=Trigger.MODEL)
    register = Register()
    register.install([patch])
    load()
    assert list(register.pending) == [patch]
    for _ in range(2):
        with pytest.raises(PatchError, match="fail.*'kind'"):
            register.apply(Trigger.MODEL)


def test_events_apply_their_patches(doctored):
    patch = entry(put_first, 'KINDS', trigger=Trigger.CPU_ENGINE)
    register = Register()
    register.install([patch])
    register.apply(Trigger.MODEL)
    assert not register.applied and not register.reached(Trigger.CPU_ENGINE)
    for _ in range(2):
        register.apply(Trigger.CPU_ENGINE)
    assert register.reached(Trigger.CPU_ENGINE) and load().KINDS == ['polite', 'plain']


@pytest.mark.parametrize(
    'name, exists',
    [
        ('json', True),
        ('json.decoder', True),
        ('json.gone', False),
        ('json.decoder.gone', False),
        ('xml.dom.minidom', True),
        ('xml.gone.minidom', False),
        ('no_such_package.at_all', False),
    ],
)
def test_whether_a_module_exists_imports_nothing(name, exists, monkeypatch):
    for loaded in [each for each in sys.modules if each.startswith('xml.dom')]:
        monkeypatch.delitem(sys.modules, loaded)
    before = set(sys.modules)
    assert module_exists(name) == exists
    assert not {each for each in set(sys.modules) - before if each.startswith(('json', 'xml'))}


def test_a_module_in_memory_exists(monkeypatch):
    monkeypatch.setitem(sys.modules, 'in_memory', ModuleType('in_memory'))
    assert module_exists('in_memory')


def test_env_lists_patches_and_names_those_that_do_not_fit(doctored, monkeypatch, capsys):
    monkeypatch.setattr('lmdeploy_vico.adapter.patches.table.all_patches', lambda: (GREET, SHOUT, KINDS))
    assert main(['env', '--patches']) == 0
    out = capsys.readouterr().out
    assert '3 of 3 fit it.' in out and 'doctored:Greeter.greet: fits' in out
    assert all(text in out for text in ('Greet politely.', 'a test', 'it ends', 'server, when its module is imported'))
    sys.modules.pop('doctored')
    doctored('times=1', 'count=1')
    assert main(['env', '--patches']) == 1
    out = ' '.join(capsys.readouterr().out.split())
    assert '2 of 3 fit it. Does not fit: "politely" (doctored:Greeter.greet)' in out
    assert "is (self, greeting='hello', *, count=1), expected (self, greeting='hello', *, times=1)" in out


def test_a_function_that_another_module_imports_by_name_is_changed_once_in_both(doctored, tmp_path, monkeypatch):
    doctored('KINDS =', 'def announce(text):\n    return text\n\nKINDS =')
    (tmp_path / 'announcer.py').write_text('from doctored import announce')
    calls = []

    def counted(call: Call) -> str:
        calls.append(call['text'])
        return call.proceed()

    others = {'signature': '(text)', 'why': 'a test', 'until': 'it ends', 'process': 'server'}
    patches = [Patch(counted, f'{module}:announce', **others) for module in ('doctored', 'announcer')]
    register = Register()
    register.install(patches)
    announcer = importlib.import_module('announcer')
    monkeypatch.delitem(sys.modules, 'announcer')
    for function in (announcer.announce, load().announce):
        assert function('now') == 'now'
        assert calls.pop() == 'now' and not calls
    assert register.applied == patches


def test_env_names_a_module_that_breaks_on_import_and_goes_on(doctored, tmp_path, monkeypatch, capsys):
    (tmp_path / 'broken.py').write_text('raise RuntimeError("no driver")')
    broken = Patch(put_first, 'broken:KINDS', why='a test', until='it ends', process='server')
    monkeypatch.setattr('lmdeploy_vico.adapter.patches.table.all_patches', lambda: (broken, SHOUT))
    assert main(['env', '--patches']) == 1
    out = ' '.join(capsys.readouterr().out.split())
    assert 'broken:KINDS: module broken: importing broken raises RuntimeError: no driver' in out
    assert 'doctored:Greeter.shout: fits' in out
    assert '1 of 2 fit it. Does not fit: "put first" (broken:KINDS)' in out


@pytest.mark.busy
def test_a_second_thread_returns_when_the_first_has_applied_the_patches(doctored):
    begun, go, made = threading.Event(), threading.Event(), []

    def slowly(target: Target) -> None:
        register.apply(Trigger.MODEL)  # a change may start what applies patches itself
        begun.set()
        assert go.wait(HANG)
        made.append(target.name)

    register = Register()
    register.install([entry(slowly, 'KINDS', trigger=Trigger.MODEL)])

    def second() -> list:
        register.apply(Trigger.MODEL)
        return list(made)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(register.apply, Trigger.MODEL)
        assert begun.wait(HANG)
        seen = threads.submit(second)
        assert not seen.done()
        go.set()
        first.result(HANG)
        assert seen.result(HANG) == made == ['KINDS']


@pytest.mark.busy
def test_an_import_in_another_thread_and_an_event_do_not_wait_for_each_other(doctored, tmp_path, monkeypatch):
    """The import has its module's lock and makes a patch; the event's change needs that module."""
    gates = SimpleNamespace(begun=threading.Event(), go=threading.Event())
    monkeypatch.setitem(sys.modules, 'gates', gates)
    (tmp_path / 'slow.py').write_text(
        f'import gates\ngates.begun.set()\nassert gates.go.wait({HANG})\nKINDS = ["plain"]\n'
    )

    def needs_slow(target: Target) -> None:
        gates.go.set()
        target.value.append(importlib.import_module('slow').KINDS[0])

    others = {'why': 'a test', 'until': 'it ends', 'process': 'server'}
    register = Register()
    register.install([Patch(put_first, 'slow:KINDS', **others), entry(needs_slow, 'KINDS', trigger=Trigger.MODEL)])
    load()
    with ThreadPoolExecutor(2) as threads:
        imported = threads.submit(importlib.import_module, 'slow')
        assert gates.begun.wait(HANG)
        applied = threads.submit(register.apply, Trigger.MODEL)
        applied.result(HANG)
        assert imported.result(HANG).KINDS == ['polite', 'plain']
    assert load().KINDS == ['plain', 'polite']
    monkeypatch.delitem(sys.modules, 'slow')
