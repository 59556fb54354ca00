"""What a function computes, as one expression: layers are told by their formulas, not by their names.

A formula is read from the source. Names of variables, line breaks and steps in between do not matter:

    h = self.c_fc(x)
    h = self.act(h)                      is      self.c_proj(self.act(self.c_fc(x)))
    return self.c_proj(h)

A pattern is such an expression as the text of a lambda. An attribute in capitals stands for any one, always
the same: `lambda self, x: self.DOWN(self.ACTIVATION(self.UP(x)))` matches the above, with DOWN = "c_proj".
"""

import ast
import builtins
import copy
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

# What is longer is no layer of a kind that patterns describe, and could grow without bounds.
_MAX_STATEMENTS = 12


class Formula(NamedTuple):
    parameters: tuple[str, ...]
    expression: ast.expr  # of the parameters and of globals
    scope: Mapping[str, Any]  # the globals


@lru_cache(maxsize=1024)
def formula_of(function: Callable[..., Any]) -> Formula | None:
    """The formula of a function in Python, or None where its source is not at hand or not that simple."""
    if hasattr(function, "__wrapped__"):
        return None  # what a decorator adds is not in the source
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    arguments = definition.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return None
    expression = _run(definition.body, {})
    if not isinstance(expression, ast.expr):
        return None
    parameters = tuple(argument.arg for argument in arguments.args)
    return Formula(parameters, expression, function.__globals__)


def match(
    function: object, pattern: str, functions: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """The attributes that the names in capitals stand for, or None where the formula is another one.

    Args:
        functions: globals of the pattern that are functions in Python themselves, with their patterns.
            All others must be the very objects that they are here: torch, nn and Python's own.
    """
    found = formula_of(function) if inspect.isfunction(function) else None
    wanted = _parsed(pattern)
    parameters = [argument.arg for argument in wanted.args.args]
    if found is None or len(found.parameters) != len(parameters):
        return None
    matcher = _Matcher(found, dict(zip(parameters, found.parameters, strict=True)), functions or {})
    return matcher.attributes if matcher.same(found.expression, wanted.body) else None


@cache
def _parsed(pattern: str) -> ast.Lambda:
    expression = ast.parse(pattern, mode="eval").body
    assert isinstance(expression, ast.Lambda)
    return expression


# ---- from statements to an expression ----


class _Substitute(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)


def _run(body: list[ast.stmt], values: dict[str, ast.expr]) -> ast.expr | dict[str, ast.expr] | None:
    """What the statements return; the values of the variables, if they do not; None: not that simple."""
    if len(body) > _MAX_STATEMENTS:
        return None

    def value_of(expression: ast.expr) -> ast.expr:
        value: ast.expr = _Substitute(values).visit(copy.deepcopy(expression))
        return value

    for statement in body:
        if isinstance(statement, ast.Return):
            return None if statement.value is None else value_of(statement.value)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            assigned = _assigned(statement.targets[0], value_of(statement.value))
        elif isinstance(statement, ast.If) and not statement.orelse:
            assigned = _conditional(statement, value_of(statement.test), values)
        else:
            return None
        if assigned is None:
            return None
        values = {**values, **assigned}
    return values


def _assigned(target: ast.expr, value: ast.expr) -> dict[str, ast.expr] | None:
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, ast.Tuple):
        return None
    names = [part.id for part in target.elts if isinstance(part, ast.Name)]
    if len(names) != len(target.elts):
        return None
    if isinstance(value, ast.Tuple) and len(value.elts) == len(names):
        return dict(zip(names, value.elts, strict=True))
    places = (ast.Subscript(value, ast.Constant(i), ast.Load()) for i in range(len(names)))
    return dict(zip(names, places, strict=True))


def _conditional(
    statement: ast.If, test: ast.expr, values: dict[str, ast.expr]
) -> dict[str, ast.expr] | None:
    inside = _run(statement.body, values)
    if not isinstance(inside, dict):
        return None
    changed = {name: value for name, value in inside.items() if values.get(name) is not value}
    return {
        name: ast.IfExp(test, value, values.get(name, ast.Name(name, ast.Load())))
        for name, value in changed.items()
    }


# ---- against a pattern ----

_SCOPE = {"torch": torch, "nn": nn, **vars(builtins)}


class _Matcher:
    def __init__(self, found: Formula, parameters: Mapping[str, str], functions: Mapping[str, str]) -> None:
        self.found, self.parameters, self.functions = found, parameters, functions
        self.attributes: dict[str, str] = {}

    def same(self, found: Any, wanted: Any) -> bool:
        if isinstance(wanted, ast.Name) and isinstance(found, ast.Name):
            return self._same_name(found.id, wanted.id)
        if isinstance(wanted, ast.Attribute) and wanted.attr.isupper() and isinstance(found, ast.Attribute):
            stands_for = self.attributes.setdefault(wanted.attr, found.attr)
            return stands_for == found.attr and self.same(found.value, wanted.value)
        if type(found) is not type(wanted):
            return False
        if isinstance(wanted, ast.AST):
            fields = (name for name in wanted._fields if name not in ("ctx", "kind"))
            return all(self.same(getattr(found, name), getattr(wanted, name)) for name in fields)
        if isinstance(wanted, list):
            return len(found) == len(wanted) and all(map(self.same, found, wanted))
        return bool(found == wanted)

    def _same_name(self, found: str, wanted: str) -> bool:
        if wanted in self.parameters or found in self.found.parameters:
            return self.parameters.get(wanted) == found
        meant = self.found.scope.get(found, vars(builtins).get(found))
        if wanted in self.functions:
            return match(meant, self.functions[wanted], self.functions) is not None
        return meant is not None and meant is _SCOPE.get(wanted)
