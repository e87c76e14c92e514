"""One register of the changes to LMDeploy: what each expects to find there, when it is made, and whether it was made.

A :class:`Patch` names its target. With a signature it wraps a function, without one it edits an object. The tables of
patches stand in ``adapter/patches/`` and ``cpu/``; this module imports nothing of LMDeploy and knows none of them.
The :data:`register` of a process applies each patch at most once.
"""

import importlib
import importlib.util
import inspect
import logging
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Literal

import wrapt

logger = logging.getLogger(__name__)

Process = Literal['server', 'engine', 'server and engine']


class PatchError(RuntimeError):
    """LMDeploy could not be changed as needed; the message names the patches and says what to do."""


class MisfitError(Exception):
    """A patch does not fit the installed LMDeploy; the message says why."""


class Trigger(Enum):
    """The event that applies a patch."""

    IMPORT = 'when its module is imported'
    MODEL = 'when a ViCO model starts'
    CPU_ENGINE = 'when an engine starts on a CPU'
    TURBOMIND = 'when a ViCO model starts on TurboMind'


class Call:
    """One call of a wrapped function. ``call['name']`` is an argument, as the function would see it.

    Attributes:
        instance: the object or class that the function is bound to, or None.
    """

    def __init__(self, signature: inspect.Signature, original: Callable[..., Any], instance: Any, passed: Any) -> None:
        self._signature = signature
        self._original = original
        self.instance = instance
        self._args, self._kwargs = passed

    def _bind(self) -> inspect.BoundArguments:
        first = () if self.instance is None else (self.instance,)
        return self._signature.bind(*first, *self._args, **self._kwargs)

    def __getitem__(self, name: str) -> Any:
        bound = self._bind()
        bound.apply_defaults()
        return bound.arguments[name]

    def proceed(self, **changed: Any) -> Any:
        """Call LMDeploy's own function with the arguments as they came, but for those that are ``changed``."""
        if not changed:
            return self._original(*self._args, **self._kwargs)
        bound = self._bind()
        bound.arguments.update(changed)
        args = bound.args if self.instance is None else bound.args[1:]
        return self._original(*args, **bound.kwargs)


@dataclass(frozen=True)
class Target:
    """An object of LMDeploy that a patch edits: ``value``, which is ``owner.name``."""

    owner: Any
    name: str
    value: Any

    def replace(self, value: Any) -> None:
        """Put ``value`` in its place."""
        setattr(self.owner, self.name, value)


@dataclass(frozen=True, eq=False)
class Patch:
    """One change to LMDeploy. Its name is that of the function that makes it.

    Attributes:
        change: with a signature, it is called in place of the target, with a :class:`Call`, and its result is returned;
            without one, it is called once, with the :class:`Target`. Its docstring's first line says what changes.
        target: ``module:qualified.name``.
        signature: the parameters of the target without annotations, as ``(self, name, other=None)``.
        why: what LMDeploy does without it.
        until: the condition under which it can be removed.
        process: where it takes effect.
        trigger: the event that applies it.
        uses: other names of LMDeploy that the change relies on, with their signatures (None: any object). Those of
            other modules are not looked at where the patch is made, as they may be half imported then.
    """

    change: Callable[..., Any]
    target: str
    signature: str | None = None
    _: KW_ONLY
    why: str
    until: str
    process: Process
    trigger: Trigger = Trigger.IMPORT
    uses: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in messages: that of the function, in words."""
        return self.change.__name__.replace('_', ' ')

    @property
    def what(self) -> str:
        """What changes, in a sentence."""
        return (self.change.__doc__ or '').partition('\n')[0].replace('``', '`')

    @property
    def module(self) -> str:
        """The module of the target."""
        return self.target.partition(':')[0]

    def __str__(self) -> str:
        return f'"{self.name}" ({self.target})'


def find(target: str) -> Target:
    """The object that ``module:qualified.name`` names, whose module is imported.

    Raises:
        MisfitError: there is no such module or name, or the module cannot be imported.
    """
    module, _, path = target.partition(':')
    try:
        owner: Any = importlib.import_module(module)
    except ImportError as error:
        raise MisfitError(f'target missing: {module} cannot be imported ({error})') from error
    except Exception as error:  # whatever a module may raise
        raise MisfitError(f'module broken: importing {module} raises {type(error).__name__}: {error}') from error
    *outer, name = path.split('.')
    try:
        for part in outer:
            owner = getattr(owner, part)
        return Target(owner, name, getattr(owner, name))
    except AttributeError as error:
        raise MisfitError(f'target missing: {module} has no {path}') from error


def parameters(target: Target) -> inspect.Signature:
    """The signature of a function without annotations; of a method with ``self`` or ``cls``, bound or not."""
    function = inspect.getattr_static(target.owner, target.name)
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    bare = [
        each.replace(annotation=inspect.Parameter.empty) for each in inspect.signature(function).parameters.values()
    ]
    return inspect.Signature(bare)


def check(patch: Patch, own_module: bool = False) -> Target:
    """Return the target of a patch, whose module is imported; the signature and what the patch uses are as expected.

    Args:
        own_module: leave out what it uses of modules other than the target's.

    Raises:
        MisfitError: they are not, with expected and installed signature.
    """
    for target, expected in {patch.target: patch.signature, **patch.uses}.items():
        if own_module and target.partition(':')[0] != patch.module:
            continue
        found = find(target)
        if expected is None:
            continue
        installed = str(parameters(found)) if callable(found.value) else 'not a function'
        if installed != expected:
            raise MisfitError(f'signature changed: {target} is {installed}, expected {expected}')
    return find(patch.target)


def module_exists(name: str) -> bool:
    """Return whether a module can be found; imports nothing."""
    return name in sys.modules or _find_spec(name) is not None


def _find_spec(name: str) -> ModuleSpec | None:
    package = name.rpartition('.')[0]
    if not package:
        return importlib.util.find_spec(name)
    if package in sys.modules:
        return PathFinder.find_spec(name, getattr(sys.modules[package], '__path__', []))
    spec = _find_spec(package)
    return PathFinder.find_spec(name, spec.submodule_search_locations or []) if spec else None


class _BoundWrapper(wrapt.BoundFunctionWrapper):
    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._self_instance is None:
            return self._self_parent.__reduce_ex__(protocol)
        return getattr, (self._self_instance, self.__name__)


class _Wrapper(wrapt.FunctionWrapper):
    """A wrapt wrapper that can be pickled, by its name: LMDeploy starts processes with functions that are wrapped."""

    __bound_function_wrapper__ = _BoundWrapper

    def __init__(self, wrapped: Any, wrapper: Any, patch: Patch) -> None:
        super().__init__(wrapped, wrapper)
        self._self_patch = patch

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _load, (self._self_patch.target,)


def _load(target: str) -> Any:
    module, _, path = target.partition(':')
    return operator.attrgetter(path)(importlib.import_module(module))


def _make(patch: Patch) -> None:
    """Check a patch and make its change, unless the target was imported by name from where it is made already."""
    target = check(patch, own_module=True)
    if patch.signature is None:
        patch.change(target)
        return
    if isinstance(target.value, _Wrapper) and target.value._self_patch.change is patch.change:
        return
    signature = parameters(target)

    def call(original: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return patch.change(Call(signature, original, instance, (args, kwargs)))

    wrapt.wrap_object(target.owner, target.name, _Wrapper, (call, patch))


class Register:
    """The patches of a process. A patch is applied once, however often it is installed or triggered.

    Threads may use it side by side. A thread that makes the patch of an import holds the import lock of its module, and
    a change may import other modules. So nothing is locked while a patch is made on an import; there is one lock for
    what is noted here, under which nothing is imported, and one for :meth:`apply`, for which no import ever waits.

    Attributes:
        pending: installed and not yet triggered.
        applied: made.
        failed: could not be made, with the reason; logged once, and raised where a ViCO model is served.
    """

    def __init__(self) -> None:
        self.pending: dict[Patch, Literal[True]] = {}  # in the order of their installation
        self.applied: list[Patch] = []
        self.failed: dict[Patch, str] = {}
        self._installed: set[Patch] = set()
        self._reached: set[Trigger] = set()
        self._required = False
        self._noting = threading.Lock()
        self._applying = threading.RLock()  # a change may start what applies patches itself

    def install(self, patches: Iterable[Patch]) -> None:
        """Have the patches applied by their triggers: at once those whose module has been imported already."""
        for patch in patches:
            with self._noting:
                if patch in self._installed:
                    continue
                self._installed.add(patch)
                self.pending[patch] = True
            if patch.trigger is Trigger.IMPORT:
                wrapt.register_post_import_hook(partial(self._on_import, patch), patch.module)

    def apply(self, trigger: Trigger) -> None:
        """Apply the patches of an event that is not an import; repeating it does nothing.

        Where another thread applies them already, this returns when it has done so.

        Raises:
            PatchError: one of them does not fit.
        """
        with self._applying:
            self._reached.add(trigger)
            for patch in [patch for patch in list(self.pending) if patch.trigger is trigger]:
                self._apply(patch)
            self._raise({patch: reason for patch, reason in list(self.failed.items()) if patch.trigger is trigger})

    def reached(self, trigger: Trigger) -> bool:
        """Return whether an event has come in this process."""
        return trigger in self._reached

    def require_all(self) -> None:
        """Make sure that every patch made on an import is made, or will be: a ViCO model is going to be served.

        A module that has not been imported must exist. From now on, a patch that fails raises where its module is
        imported.

        Raises:
            PatchError: a patch has failed, or its module does not exist.
        """
        self._required = True
        for patch in list(self.pending):
            if patch.trigger is Trigger.IMPORT and not module_exists(patch.module) and self._claim(patch):
                self.failed[patch] = f'target missing: there is no module {patch.module}'
        self._raise(self.failed)

    def _on_import(self, patch: Patch, module: ModuleType) -> None:
        del module
        self._apply(patch)
        if self._required:
            self._raise(self.failed)

    def _claim(self, patch: Patch) -> bool:
        """Take a patch off the list of what is pending; return False if that has been done."""
        with self._noting:
            return self.pending.pop(patch, False)

    def _apply(self, patch: Patch) -> None:
        if not self._claim(patch):
            return
        try:
            _make(patch)
        except Exception as error:
            # Raising here would break `import lmdeploy...` in programs that have nothing to do with ViCO.
            self.failed[patch] = str(error) or repr(error)
            unexpected = not isinstance(error, MisfitError)
            logger.error('lmdeploy-vico: %s was not applied: %s', patch, self.failed[patch], exc_info=unexpected)
        else:
            self.applied.append(patch)

    def _raise(self, failed: Mapping[Patch, str]) -> None:
        if failed:
            reasons = '; '.join(f'{patch}: {reason}' for patch, reason in list(failed.items()))
            raise PatchError(
                f'lmdeploy-vico cannot change the installed LMDeploy as it has to: {reasons}. Install an LMDeploy that '
                'it supports; `lmdeploy-vico env --patches` checks every change.'
            )


register = Register()
