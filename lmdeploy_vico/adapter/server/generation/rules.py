"""The forms of a rule for one parameter: a function that returns what the engine is given, or says what is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.wording import shown


@dataclass(frozen=True)
class Limits:
    """What the server can do for one request.

    Attributes:
        vocabulary: tokens of the language model.
        context: tokens that fit behind the prompt.
        logprobs: whether the server computes log probabilities.
        routed_experts: whether it returns the experts that tokens were routed to.
        disaggregated: whether it has a role in disaggregated serving.
        turbomind: whether TurboMind runs the language model.
    """

    vocabulary: int
    context: int
    logprobs: bool = True
    routed_experts: bool = True
    disaggregated: bool = False
    turbomind: bool = False


Rule = Callable[[str, Any, Limits], Any]
Bound = int | Callable[[Limits], int]


def flag(name: str, value: Any, limits: Limits) -> bool:
    """True or false, or 1 or 0; not given is false."""
    del limits
    if not isinstance(value, int | None) or value not in (None, False, True):
        raise ParameterError(f'{name} must be true or false, not {shown(value)}.')
    return bool(value)


def number(lowest: float, highest: float) -> Rule:
    """A finite number within bounds, both included."""

    def check(name: str, value: Any, limits: Limits) -> float:
        del limits
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or not lowest <= value <= highest:  # NaN compares false
            raise ParameterError(f'{name} must be a number from {lowest:g} to {highest:g}, not {shown(value)}.')
        return float(value)

    return check


def integer(lowest: int, highest: Bound, clamp: bool = False) -> Rule:
    """An integer within bounds, both included; with ``clamp``, the highest takes the place of larger ones."""

    def check(name: str, value: Any, limits: Limits) -> int:
        most = highest(limits) if callable(highest) else highest
        exact = isinstance(value, Integral) and not isinstance(value, bool)
        if not exact or value < lowest or (value > most and not clamp):
            wanted = f'an integer of at least {lowest}' if clamp else f'an integer from {lowest} to {most}'
            raise ParameterError(f'{name} must be {wanted}, not {shown(value)}.')
        return int(min(value, most))

    return check


def optional(rule: Rule) -> Rule:
    """Nothing, or what another rule accepts."""
    return lambda name, value, limits: None if value is None else rule(name, value, limits)


def list_of(rule: Rule, longest: int) -> Rule:
    """A list whose items another rule accepts."""

    def check(name: str, value: Any, limits: Limits) -> list[Any]:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise ParameterError(f'{name} must be a list, not {shown(value)}.')
        if len(value) > longest:
            raise ParameterError(f'{name} must have at most {longest} items, not {len(value)}.')
        return [rule(f'An item of {name}', item, limits) for item in value]

    return check


def word(longest: int) -> Rule:
    """A text that is not empty."""

    def check(name: str, value: Any, limits: Limits) -> str:
        del limits
        if not isinstance(value, str) or not value:
            raise ParameterError(f'{name} must be a text that is not empty, not {shown(value)}.')
        if len(value) > longest:
            raise ParameterError(f'{name} must have at most {longest} characters, not {len(value)}.')
        return value

    return check


def one_of(*values: Any) -> Rule:
    """One of the given values."""

    def check(name: str, value: Any, limits: Limits) -> Any:
        del limits
        if not isinstance(value, str | None) or value not in values:
            raise ParameterError(f'{name} must be one of {", ".join(map(repr, values))}, not {shown(value)}.')
        return value

    return check


def only_if(able: Callable[[Limits], bool], reason: str, rule: Rule, absent: tuple[Any, ...] = (None, False)) -> Rule:
    """What another rule accepts, if the server is able to; what is ``absent`` is accepted everywhere."""

    def check(name: str, value: Any, limits: Limits) -> Any:
        if any(type(value) is type(one) and value == one for one in absent):
            return value
        if not able(limits):
            raise ParameterError(f'{name} is not available: {reason}')
        return rule(name, value, limits)

    return check


def anything(name: str, value: Any, limits: Limits) -> Any:
    """Whatever it is: checked elsewhere, or not used by the engine."""
    del name, limits
    return value
