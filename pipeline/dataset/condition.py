"""Choosing samples by their rows: `mean_log_prob > -2.5 and label in (1, 2) and not is_blank`.

A condition is written as a Python expression, and read as one of pyarrow: columns, numbers, texts,
`+ - * /`, comparisons, `in`, `and`, `or`, `not`. A column that has a value for every scale stands
for their mean, and `mean_log_prob[9]` for that of a scale. An empty cell fits no comparison.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from depthvar.errors import InputError, shown

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left.cast("float64") / right,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
}
_PLACE, _MEAN = "place of the row", "mean of {}"  # columns that no dataset has


class Condition:
    """A condition on rows of a schema. Errors: `InputError` for what is none."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text, self._schema = text, schema
        self.columns: set[str] = set()
        """The columns it speaks of."""
        try:
            self._expression = self._read(ast.parse(text.strip(), mode="eval").body)
        except InputError:
            raise
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", error)
            raise self._refusal(f"which does not parse: {reason}") from error
        self.places(schema.empty_table())

    def places(self, rows: pa.Table) -> np.ndarray:
        """Which of the rows it fits: their places, counted from 0, in order."""
        table = rows.select(sorted(self.columns))
        for name in table.column_names:
            if pa.types.is_list(rows.schema.field(name).type):
                flat = rows.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
                means = flat.reshape(len(rows), -1).mean(axis=1) if len(rows) else flat
                table = table.append_column(_MEAN.format(name), pa.array(means))
        table = table.append_column(_PLACE, pa.array(np.arange(len(rows))))
        try:
            fitting = table.filter(self._expression)
        except (pa.ArrowException, TypeError) as error:
            reason = " ".join(str(error).split())
            raise self._refusal(f"which cannot be told of the columns: {reason}") from error
        return cast(np.ndarray, fitting.column(_PLACE).to_numpy())

    def _read(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.Name(id=name):
                is_list = pa.types.is_list(self._type(name))
                return pc.field(_MEAN.format(name) if is_list else name)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(scale))):
                self._type(name)
                return pc.list_element(pc.field(name), scale)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._read(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self._read(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self._read(left), self._read(right))
            case ast.BoolOp(op=op, values=parts):
                return reduce(_OPERATORS[type(op)], map(self._read, parts))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                pairs = zip([left, *rights], ops, rights, strict=False)
                return reduce(operator.and_, (self._compared(*pair) for pair in pairs))
            case _:
                what = "columns, numbers, texts, + - * /, comparisons, in, and, or, not"
                raise self._refusal(f"with {ast.unparse(node)!r}, wanted {what}")

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        value = self._read(left)
        if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value, self._read(right))
        if not isinstance(op, ast.In | ast.NotIn) or not isinstance(right, ast.Tuple | ast.List):
            raise self._refusal(f"with {ast.unparse(right)!r}, wanted a list: write `in (1, 2)`")
        members = (value == self._read(member) for member in right.elts)
        among = reduce(operator.or_, members, pc.scalar(False))
        return among if isinstance(op, ast.In) else ~among

    def _type(self, name: str) -> pa.DataType:
        """The type of a column, which is one of those that the condition speaks of."""
        if name not in self._schema.names:
            near = difflib.get_close_matches(name, self._schema.names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self._schema.names)}"
            raise self._refusal(f"with the unknown column {name!r}: {hint}")
        self.columns.add(name)
        return self._schema.field(name).type

    def _refusal(self, problem: str) -> InputError:
        return InputError(f"got the condition {shown(self._text)}, {problem}")
