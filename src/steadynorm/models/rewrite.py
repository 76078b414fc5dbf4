"""Find, in the source of a forward, each batch norm whose result only an activation or sum uses.

Only what holds whatever the arguments, flags and branches is found, by the syntax alone:

    self.act(self.bn(x))            y = self.bn(x); y = self.act(y)         relu(self.bn(x) + z)
    if self.bn is not None: y = self.bn(y)            if self.act is not None: y = self.act(y)
    y = self.bn(self.conv(x)); if ...: z = self.down(x); y += z; y = self.act(y)

In the last, statements stand between the batch norm and the sum. The batch norm may run after them,
since they do not name `y`, and since nothing but `y` holds what a convolution has just returned.

`merged` gives the same function with each such place as one call,
`self._call_fused(self.bn, self.act, x, z, "+=")`. Everything else of the source stays.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType

HELPER = "_call_fused"
# Code whose order or names could not be followed.
REFUSED = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try, ast.NamedExpr,
    ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal, ast.Delete, ast.Match,
)  # fmt: skip
REFUSED_NAMES = {"super", "locals", "vars", "eval", "exec", "__class__"}


@dataclass(frozen=True)
class Site:
    """One place where a batch norm can run in one call with what follows it.

    `norm`, `activation`: as written, `self.` left out of the first; `residual`: whether a sum
    stands between. `host`: the layer that has just made the batch norm's input, where the batch
    norm is moved past other calls, which are `crossed`.
    """

    norm: str
    activation: str | None
    residual: bool
    host: str | None = None
    crossed: tuple[str, ...] = ()


@cache
def sites(function: FunctionType) -> tuple[Site, ...] | str:
    """All places in a forward, or why its source cannot be followed."""
    if (
        type(function) is not FunctionType
        or function.__closure__
        or hasattr(function, "__wrapped__")
    ):
        return "its forward is decorated, or uses super() or names of an outer function"
    try:
        module, tree = _parsed(function)
    except (OSError, TypeError, SyntaxError, StopIteration):
        return "the source of its forward cannot be read"
    if tree.decorator_list or not tree.args.args:
        return "its forward is decorated, or no plain method"
    own = _own_name(tree)
    for node in ast.walk(tree):
        rebinds = isinstance(node, ast.Name) and node.id == own and type(node.ctx) is not ast.Load
        named = isinstance(node, ast.Name) and node.id in REFUSED_NAMES
        if rebinds or named or (isinstance(node, REFUSED) and node is not tree):
            return f"its forward has code that is not followed (line {getattr(node, 'lineno', 0)})"
    if _compiled(module, function) != function.__code__:
        return "the source of its forward is not what runs"
    found: list[Site] = []

    def collect(site: Site) -> bool:
        found.append(site)
        return False

    _Merger(own, collect).merge(tree)
    return tuple(found)


@cache
def returned_call(function: FunctionType) -> str | None:
    """`f` of a method that is `return f(x)`, x its one argument, and nothing else."""
    if isinstance(sites(function), str):
        return None
    _, tree = _parsed(function)
    documented = ast.get_docstring(tree) is not None
    body, arguments = tree.body[documented:], tree.args.args
    call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    alone = len(arguments) == 2 and _is(call.args[0], arguments[1].arg) and _dotted(call.func)
    return ast.unparse(call.func) if alone else None


def merged(function: FunctionType, chosen: frozenset[Site]) -> FunctionType:
    """The function with the chosen places merged, in the same module's names."""
    module, tree = _parsed(function)
    _Merger(_own_name(tree), chosen.__contains__).merge(tree)
    code = _compiled(ast.fix_missing_locations(module), function)
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    return new


def _parsed(function: FunctionType) -> tuple[ast.Module, ast.FunctionDef]:
    """The syntax tree of the function's whole file, since that decides how it compiles."""
    lines, _ = inspect.findsource(function)
    module = ast.parse("".join(lines))
    first = function.__code__.co_firstlineno
    return module, next(
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and (node.name, node.lineno) == (function.__name__, first)
    )


def _compiled(module: ast.Module, function: FunctionType) -> CodeType:
    """The function's code as compiled from its file."""
    codes = [compile(module, function.__code__.co_filename, "exec", dont_inherit=True)]
    wanted = (function.__code__.co_name, function.__code__.co_firstlineno)
    for code in codes:
        if (code.co_name, code.co_firstlineno) == wanted:
            return code
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    raise OSError("the source holds no such function")


def _own_name(tree: ast.FunctionDef) -> str:
    return tree.args.args[0].arg


class _Merger(ast.NodeTransformer):
    """Merges the places that `wanted` accepts."""

    def __init__(self, own: str, wanted: Callable[[Site], bool]) -> None:
        self.own = own
        self.wanted = wanted
        self.uses: dict[str, int] = {}

    def merge(self, tree: ast.FunctionDef) -> None:
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        self.uses = {name: names.count(name) for name in names}
        self.visit(tree)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, self.block(block))
        return super().generic_visit(node)

    # --- within one expression

    def visit_Call(self, node: ast.Call) -> ast.AST:
        activation = self.activation(node)
        merged = None if activation is None else self.expression(node.args[0], activation)
        return merged or self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        return self.expression(node, None) or self.generic_visit(node)

    def expression(self, inner: ast.expr, activation: ast.expr | None) -> ast.AST | None:
        """`activation(norm(x))`, `activation(norm(x) + name)` or `norm(x) + name` as one call."""
        call, other, order = inner, None, ""
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
            pairs = ((inner.left, inner.right, "+"), (inner.right, inner.left, "r+"))
            pair = next((p for p in pairs if self.norm(p[0]) and _dotted(p[1])), None)
            if pair is None:
                return None
            call, other, order = pair
        norm = self.norm(call)
        if norm is None or (activation is None and other is None):
            return None
        if not self.wanted(Site(norm, _text(activation), other is not None)):
            return None
        assert isinstance(call, ast.Call)
        return self.fused(inner, call, activation, self.visit(call.args[0]), other, order)

    # --- over several statements

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        while statements:
            taken = self.statements(done[-1] if done else None, statements)
            if taken is None:
                done.append(statements[0])
                statements = statements[1:]
            else:
                done += taken[0]
                statements = statements[taken[1] :]
        return done

    def statements(
        self, before: ast.stmt | None, rest: list[ast.stmt]
    ) -> tuple[list[ast.stmt], int] | None:
        """What replaces the first statements, and how many; None where nothing starts here."""
        first, only_if = self.conditional(rest[0])
        name, value = _assigned(first)
        norm = None if value is None else self.norm(value)
        if name is None or norm is None or len(rest) < 2:
            return None
        assert isinstance(value, ast.Call)
        if only_if is not None and not _is(value.args[0], name):
            return None
        last, also_if = self.conditional(rest[1])
        activation = self.ends(last, name)
        if also_if is not None and _assigned(last)[0] != name:
            activation = None
        if activation is not None:
            if not self.wanted(Site(norm, _text(activation), False)):
                return None
            call = ast.Call(_or_none(value.func, only_if), value.args, [])
            new = self.fused(value, call, _or_none(activation, also_if), value.args[0], None, "")
            return [_with_value(last, new)], 2
        return None if only_if is not None else self.sum(before, rest, name, norm, value)

    def conditional(self, statement: ast.stmt) -> tuple[ast.stmt, ast.expr | None]:
        """The statement inside an `if` about the module alone, and what it asks."""
        if not (isinstance(statement, ast.If) and len(statement.body) == 1):
            return statement, None
        names = {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}
        runs = any(isinstance(node, ast.Call) for node in ast.walk(statement.test))
        alone = names <= {self.own} and not runs and not statement.orelse
        return (statement.body[0], statement.test) if alone else (statement, None)

    def sum(
        self, before: ast.stmt | None, rest: list[ast.stmt], name: str, norm: str, call: ast.Call
    ) -> tuple[list[ast.stmt], int] | None:
        """`y = norm(x)`, statements that do not name y, `y += z`, and perhaps `y = act(y)`."""
        at = 1
        crossed: list[str] = []
        while at < len(rest) and (paths := self.crossed(rest[at], name)) is not None:
            crossed += paths
            at += 1
        if at == len(rest):
            return None
        activation, other, order = self.added(rest[at], name)
        paths = None if other is None else self.crossed_by(other, name)
        if other is None or paths is None:
            return None
        crossed += paths
        last = at
        uses_up = isinstance(rest[at], ast.AugAssign) or _assigned(rest[at])[0] == name
        if activation is None and uses_up and at + 1 < len(rest):
            activation = self.ends(rest[at + 1], name)
            last = at + 1 if activation is not None else at
        host = None
        if at > 1 or not _dotted(other):
            host = self.host(before, name, call.args[0])
            if host is None:
                return None
        if not self.wanted(Site(norm, _text(activation), True, host, tuple(crossed))):
            return None
        held = ast.copy_location(ast.Name(name, ast.Load()), call)
        new = self.fused(call, call, activation, held, other, order)
        first = ast.Assign([ast.Name(name, ast.Store())], call.args[0])
        return [
            ast.copy_location(first, rest[0]),
            *rest[1:at],
            _with_value(rest[last], new),
        ], last + 1

    def added(self, statement: ast.stmt, name: str) -> tuple[ast.expr | None, ast.expr | None, str]:
        """The activation, the other addend and the kind of a sum that uses up `name`."""
        if (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.op, ast.Add)
            and _is(statement.target, name)
        ):
            return None, statement.value, "+="
        value = self.used_up(statement, name)
        activation = self.activation(value)
        if activation is not None:
            assert isinstance(value, ast.Call)
            value = value.args[0]
        if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)):
            return None, None, ""
        if _is(value.left, name):
            return activation, value.right, "+"
        return activation, value.left if _is(value.right, name) else None, "r+"

    def ends(self, statement: ast.stmt, name: str) -> ast.expr | None:
        """The activation of `y = act(y)` or `return act(y)`, after which the old y is gone."""
        value = self.used_up(statement, name)
        alone = isinstance(value, ast.Call) and bool(value.args) and _is(value.args[0], name)
        return self.activation(value) if alone else None

    def used_up(self, statement: ast.stmt, name: str) -> ast.expr | None:
        """The value of `y = ...` or `return ...`, after which the old y is gone."""
        if isinstance(statement, ast.Return):
            return statement.value
        target, value = _assigned(statement)
        gone = target is not None and (target == name or self.uses[name] == 2)
        return value if gone else None

    def crossed(self, statement: ast.stmt, name: str) -> list[str] | None:
        """The modules that a statement calls, if a batch norm may run after it; else None."""
        if isinstance(statement, ast.Pass):
            return []
        if isinstance(statement, ast.If):
            parts = [self.crossed_by(statement.test, name)]
            parts += [self.crossed(inner, name) for inner in statement.body + statement.orelse]
        else:
            target, value = _assigned(statement)
            if target is None or target == name or value is None:
                return None
            parts = [self.crossed_by(value, name)]
        return None if None in parts else [path for part in parts for path in part or ()]

    def crossed_by(self, expression: ast.expr, name: str) -> list[str] | None:
        paths = []
        for node in ast.walk(expression):
            if _is(node, name):
                return None
            if isinstance(node, ast.Call):
                path = self.path(node.func)
                if path is None:
                    return None
                paths.append(path)
        return paths

    def host(self, before: ast.stmt | None, name: str, given: ast.expr) -> str | None:
        """The module that has just made what the batch norm is given, if only that holds it."""
        if _is(given, name) and before is not None:
            target, value = _assigned(before)
            given = value if target == name and value is not None else given
        return self.path(given.func) if isinstance(given, ast.Call) else None

    # --- parts

    def path(self, node: ast.AST) -> str | None:
        """`a.b` for `self.a.b`."""
        own, _, path = (_text(node) or "").partition(".")
        return path if _dotted(node) and own == self.own and path else None

    def norm(self, node: ast.AST | None) -> str | None:
        """The path of what may be a batch norm, called with one thing alone."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return None
        return None if isinstance(node.args[0], ast.Starred) else self.path(node.func)

    def activation(self, node: ast.AST | None) -> ast.expr | None:
        """What may be an activation, called with one thing and perhaps `inplace`."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or not _dotted(node.func):
            return None
        alone = all(k.arg == "inplace" and isinstance(k.value, ast.Constant) for k in node.keywords)
        return node.func if alone and not isinstance(node.args[0], ast.Starred) else None

    def fused(
        self, at: ast.AST, call: ast.Call, activation: ast.expr | None, given: ast.expr,
        other: ast.expr | None, order: str,
    ) -> ast.expr:  # fmt: skip
        helper = ast.Attribute(ast.Name(self.own, ast.Load()), HELPER, ast.Load())
        args = [call.func, activation or ast.Constant(None), given]
        if other is not None:
            args += [other, ast.Constant(order)]
        return ast.copy_location(ast.Call(helper, args, []), at)


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """Name and value of `name = value`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return (target.id, statement.value) if isinstance(target, ast.Name) else (None, None)
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def _with_value(statement: ast.stmt, value: ast.expr) -> ast.stmt:
    """The statement giving another value; `y += z` becomes `y = value`."""
    if isinstance(statement, ast.AugAssign):
        assert isinstance(statement.target, ast.Name)
        target = ast.Name(statement.target.id, ast.Store())
        return ast.copy_location(ast.Assign([target], value), statement)
    statement.value = value  # type: ignore[attr-defined]
    return statement


def _or_none(value: ast.expr, condition: ast.expr | None) -> ast.expr:
    return value if condition is None else ast.IfExp(condition, value, ast.Constant(None))


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _dotted(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _text(node: ast.AST | None) -> str | None:
    return None if node is None else ast.unparse(node)
