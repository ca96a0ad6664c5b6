"""Ranges of arguments as data: one table of rules for each set of options, checked before anything is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What one argument may be."""

    supported: str  # completes "NAME: got VALUE, supported: "
    accepts: Callable[[Any], bool]


def check(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first of ``values`` that its rule does not accept. Values without a rule are not looked at."""
    for name, value in values.items():
        if name in rules and not rules[name].accepts(value):
            raise ValueError(f"{name}: got {shown(value)}, supported: {rules[name].supported}")


def settle(options: Any, rules: Mapping[str, Rule]) -> None:
    """`check` the fields of a frozen dataclass, then make them `plain`: what its ``__post_init__`` begins with."""
    check(rules, vars(options))
    for name, value in vars(options).items():
        object.__setattr__(options, name, plain(value))


def plain(value: Any) -> Any:
    """Numbers of numpy, which overflow and which JSON does not take, as Python's; lists as tuples."""
    if _of_numpy(value, "generic"):
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


def shown(value: Any) -> str:
    """A value as an error names it: strings in quotes, everything on one short line."""
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the one of ``names`` that looks most like ``name``, empty if none does."""
    import difflib

    found = difflib.get_close_matches(name, [*names], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def whole(least: int, most: int | None = None) -> Rule:
    """An integer (Python's or numpy's, no bool) of at least ``least`` and at most ``most``."""
    supported = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return Rule(supported, lambda value: _is(value, Integral) and least <= value and (most is None or value <= most))


def at_least(least: float) -> Rule:
    return Rule(f"a finite number of at least {least:g}", lambda value: _is(value, Real) and least <= value < math.inf)


def above(bound: float, below: float = math.inf) -> Rule:
    supported = f"a finite number above {bound:g}" + ("" if below == math.inf else f" and below {below:g}")
    return Rule(supported, lambda value: _is(value, Real) and bound < value < below)


def above_or_infinite(bound: float) -> Rule:
    return Rule(f"a number above {bound:g}, or infinity", lambda value: _is(value, Real) and bound < value)


def decay() -> Rule:
    """The factor by which a running mean forgets."""
    return Rule("a number of at least 0 and below 1", lambda value: _is(value, Real) and 0 <= value < 1)


def finite() -> Rule:
    return Rule("a finite number", lambda value: _is(value, Real) and math.isfinite(value))


def between(least: float, most: float) -> Rule:
    return Rule(f"a number from {least:g} to {most:g}", lambda value: _is(value, Real) and least <= value <= most)


def share() -> Rule:
    return Rule("a share from 0 to 1", lambda value: _is(value, Real) and 0 <= value <= 1)


def choice(*names: str) -> Rule:
    return Rule(", ".join(map(repr, names)), lambda value: isinstance(value, str) and value in names)


def tuple_of(*names: str) -> Rule:
    """A tuple or list, which may be empty, of some of these names."""
    supported = f"a tuple of some of {', '.join(map(repr, names))}"
    return Rule(supported, lambda value: isinstance(value, tuple | list) and all(isinstance(v, str) and v in names for v in value))


def flag() -> Rule:
    return Rule("True or False", lambda value: isinstance(value, bool) or _of_numpy(value, "bool_"))


def instance(kind: type) -> Rule:
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    return Rule(f"{article} {kind.__name__} of {kind.__module__.partition('.')[0]}", lambda value: isinstance(value, kind))


def optional(rule: Rule) -> Rule:
    return Rule(f"None, or {rule.supported}", lambda value: value is None or rule.accepts(value))


def either(first: Rule, second: Rule) -> Rule:
    return Rule(f"{first.supported}; or {second.supported}", lambda value: first.accepts(value) or second.accepts(value))


def each(rule: Rule, count: int | None = None) -> Rule:
    """A tuple or list whose elements all follow ``rule``, ``count`` of them or at least one."""
    number = "at least one" if count is None else str(count)

    def accepts(value: Any) -> bool:
        return isinstance(value, tuple | list) and (len(value) == count if count else len(value) > 0) and all(map(rule.accepts, value))

    return Rule(f"{number} in a tuple, each {rule.supported}", accepts)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and not _of_numpy(value, "bool_")


def _of_numpy(value: Any, kind: str) -> bool:
    """Whether ``value`` is of this class of numpy, which is not imported for the question: without it nothing is."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, kind))
