"""Conditions and sentences that a member's file states as text, evaluated without importing it.

A member refuses cells by a literal table: under which condition, for which reason, with which
remedy (`benchsuite/plan/declared.py`). A condition is a Python expression of names, numbers, text,
comparisons, `in`, `and`, `or`, `not`, `+ - * / // %`, `min` and `max`; nothing else is evaluated,
and nothing is ever called or imported:

    0 < moving_rate < 1 and cell.replicas * moving_rate > 1

A sentence is a format string whose fields are such expressions: `moving_rate = {moving_rate:g}`.
Imports no torch.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

# Looks up `name` as (name, "") and `cell.replicas` as ("cell", "replicas").
Lookup = Callable[[str, str], Any]


class NotKnown(Exception):
    """A number that an expression needs is not known, e.g. an option that the member lacks."""


_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}
_CALCULATE: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"min": min, "max": max}


@dataclass(frozen=True)
class Expression:
    """One expression, parsed and known to hold nothing but what this module evaluates."""

    text: str
    tree: ast.expr

    @property
    def names(self) -> Iterator[tuple[str, str]]:
        """Every name that the expression looks up, as `Lookup` is asked for it.

        Functions are none of them, and of `cell.replicas` the two halves are one name.
        """
        # By identity: nodes of a tree have no equality, and the same name may stand once as a
        # function and once as a number.
        called = {id(n.func) for n in ast.walk(self.tree) if isinstance(n, ast.Call)}
        owners = {id(n.value) for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield node.value.id, node.attr
            elif isinstance(node, ast.Name) and id(node) not in called | owners:
                yield node.id, ""

    def value(self, lookup: Lookup) -> Any:
        """The expression's value. NotKnown where a number is missing on the way.

        lookup: gives the values of names; what it raises passes through.
        """
        return _value(self.tree, lookup)

    def holds(self, lookup: Lookup) -> bool:
        """Whether a condition holds; one that rests on a number that is not known does not.

        A member is refused for what is known to be wrong, never for what nobody can tell.
        """
        try:
            return bool(self.value(lookup))
        except NotKnown:
            return False


@dataclass(frozen=True)
class Sentence:
    """A format string whose fields are expressions."""

    parts: tuple[tuple[str, Expression | None, str], ...]  # text before, field, format

    def said(self, lookup: Lookup) -> str:
        """The sentence with every field's value put in; NotKnown where one of them is missing."""
        written = []

        for text, expression, format_spec in self.parts:
            written.append(text)
            if expression is None:
                continue

            value = expression.value(lookup)
            # `{x:g}` of a text is an error for Python; here an option may be a number or a word.
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            written.append(format(value, format_spec) if is_number else str(value))

        return "".join(written)


def expression(text: str) -> Expression:
    """The parsed expression. ValueError says what cannot be evaluated, and names what can.

    text: one line of Python, as a member's file states it; it is parsed and never executed.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from error
    _check(tree)
    return Expression(text, tree)


def sentence(text: str) -> Sentence:
    """The parsed sentence. ValueError says which field cannot be evaluated.

    Formats behind a colon (`{rate:g}`) are Python's own and are kept as text.
    """
    parts = []
    for before, field, format_spec, _ in Formatter().parse(text):
        parts.append((before, None if field is None else expression(field), format_spec or ""))
    return Sentence(tuple(parts))


def _check(node: ast.expr) -> None:
    """ValueError for anything in the expression that `_value` does not evaluate.

    Allowed is what is listed: of the rest of Python, attributes of attributes and calls of methods
    alone would be enough to reach anything in this process.
    """
    match node:
        case ast.Name() | ast.Attribute(value=ast.Name()):
            return
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return
        case ast.BoolOp(values=parts) | ast.Tuple(elts=parts):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            parts = [operand]
        case ast.BinOp(op=op) if type(op) in _CALCULATE:
            parts = [node.left, node.right]
        case ast.Compare(ops=ops) if all(type(op) in _COMPARE for op in ops):
            parts = [node.left, *node.comparators]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            parts = node.args
        case _:
            raise ValueError(
                f"{ast.unparse(node)!r} is not allowed in a condition; names, numbers, text, "
                "comparisons, in, and, or, not, + - * / // %, min and max are"
            )

    for part in parts:
        _check(part)


def _value(node: ast.expr, lookup: Lookup) -> Any:
    """The value of a tree that `_check` has let through."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return lookup(node.id, "")
        case ast.Attribute(value=ast.Name(id=owner)):
            return lookup(owner, node.attr)
        case ast.BoolOp(op=ast.And()):
            # `all` and `any` stop early, as `and` does: `b > 0 and a / b > 1` must not divide by 0.
            return all(_value(part, lookup) for part in node.values)
        case ast.BoolOp():
            return any(_value(part, lookup) for part in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, lookup)
        case ast.UnaryOp():
            return _applied(operator.neg, _value(node.operand, lookup))
        case ast.BinOp():
            left = _value(node.left, lookup)
            return _applied(_CALCULATE[type(node.op)], left, _value(node.right, lookup))
        case ast.Compare():
            return _compared(node, lookup)
        case ast.Tuple():
            return tuple(_value(part, lookup) for part in node.elts)
        case ast.Call(func=ast.Name(id=name)):
            values = [_value(part, lookup) for part in node.args]
            return _applied(_FUNCTIONS[name], *values)

    raise AssertionError(f"{ast.dump(node)}: checked when it was parsed")


def _compared(node: ast.Compare, lookup: Lookup) -> bool:
    """`a < b < c` is true where every neighbouring pair is."""
    left = _value(node.left, lookup)
    for compare, side in zip(node.ops, node.comparators, strict=True):
        right = _value(side, lookup)
        if not _applied(_COMPARE[type(compare)], left, right):
            return False
        left = right
    return True


def _applied(function: Callable[..., Any], *values: Any) -> Any:
    """None and text have no order and no sum: the number is not known. So has a division by 0."""
    try:
        return function(*values)
    except (TypeError, ZeroDivisionError) as error:
        raise NotKnown from error
