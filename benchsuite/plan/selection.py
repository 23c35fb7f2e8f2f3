"""`--only EXPR`: picks cells by a Boolean expression over their fields. No torch.

    topology == 'ring' and replicas > 1
    topology in (ring, native)              bare words are text
    options.asynchronous.lock == none       a member the cell does not use has no options: None
    not straggler

Only comparisons, `in`, `and`, `or`, `not`, names, literals; nothing is ever called or imported.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.cell import AXES, Cell
from benchsuite.plan.fields import FIELDS

NAMES = (*FIELDS, "id", "label", "num_workers", "num_servers", "world_size")

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Selection:
    """A parsed expression.

    Raises UsageError for a text that is none; the message lists the fields, the nearest first.
    """

    def __init__(self, text: str) -> None:
        """Parses the text at once, so that a mistake costs nothing but a message."""
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            example = "topology == ring and replicas > 1"
            raise UsageError(f"--only {text!r}: {error.msg}; write e.g. {example!r}") from error
        self._check(self._tree)

    def keeps(self, cell: Cell) -> bool:
        """Whether the expression holds for a resolved cell."""
        values = cell.to_json()
        # By the name that lists show: a path would have to be written as the plan wrote it.
        values |= {axis: plugins.stem(values[axis]) for axis in AXES}
        values |= {name: getattr(cell, name) for name in NAMES if name not in values}
        return bool(self._value(self._tree, values))

    def _check(self, node: ast.expr) -> None:
        """UsageError for a comparison or a condition without a field of a cell.

        Every comparison has a field on one side: `snc == ring` would compare two words, which is
        false for every cell, and keep none of them without a reason.
        """
        for part in ast.walk(node):
            if isinstance(part, ast.Compare):
                names = [inner.id for inner in ast.walk(part) if isinstance(inner, ast.Name)]
                if not any(name in NAMES for name in names):
                    word = names[0] if names else ast.unparse(part.left)
                    raise UsageError(
                        f"--only {self.text!r}: " + plugins.unknown("field", word, NAMES)
                    )

        for part in [
            node,
            *(v for p in ast.walk(node) if isinstance(p, ast.BoolOp) for v in p.values),
        ]:
            while isinstance(part, ast.UnaryOp):
                part = part.operand

            if isinstance(part, ast.Name) and part.id not in NAMES:
                raise UsageError(
                    f"--only {self.text!r}: " + plugins.unknown("field", part.id, NAMES)
                )

    def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        """The value of a part of the expression for one cell.

        values: its fields by name. A name that is no field is the word itself, so that shells need
        no second quotes. Raises UsageError for what is not allowed.
        """
        match node:
            case ast.BoolOp(op=ast.And()):
                return all(self._value(part, values) for part in node.values)
            case ast.BoolOp():
                return any(self._value(part, values) for part in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not self._value(node.operand, values)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Compare():
                return self._compare(node, values)
            case ast.Name():
                return values[node.id] if node.id in NAMES else node.id
            case ast.Constant():
                return node.value
            case ast.Tuple() | ast.List() | ast.Set():
                return [self._value(item, values) for item in node.elts]
            case ast.Attribute():
                # A member that the cell does not use has no options, and one option of none is
                # None.
                inner = self._value(node.value, values)
                return inner.get(node.attr) if isinstance(inner, Mapping) else None
            case ast.Subscript(slice=ast.Constant(value=key)):
                inner = self._value(node.value, values)
                return inner.get(str(key)) if isinstance(inner, Mapping) else None

        raise UsageError(
            f"--only {self.text!r}: {ast.unparse(node)!r} is not allowed; "
            "comparisons, in, and, or, not over fields of a cell are"
        )

    def _compare(self, node: ast.Compare, values: Mapping[str, Any]) -> bool:
        """Whether a chain of comparisons holds: `1 < replicas < 8` where both pairs do."""
        left = self._value(node.left, values)

        for compare, side in zip(node.ops, node.comparators, strict=True):
            right = self._value(side, values)
            operation = _COMPARE.get(type(compare))
            if operation is None:
                raise UsageError(f"--only {self.text!r}: use == and != instead of 'is'")

            try:
                holds = operation(left, right)
            except TypeError:
                if left is None or right is None:  # not set, e.g. link_mbit > 100 without a link
                    return False

                raise UsageError(
                    f"--only {self.text!r}: {left!r} and {right!r} do not compare"
                ) from None

            if not holds:
                return False

            left = right

        return True
