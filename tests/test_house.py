"""The law of the house, read from the source: who imports whom, and where arithmetic may live.

Every checker is a function from source text to a list of complaints, and every checker has a test
that it complains when it should.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "steadynorm"

FRAMEWORKS = ("torch", "keras", "tensorflow", "jax", "flax")
KERAS, JAX = "steadynorm.keras", "steadynorm.jax"
KERNELS, NN = "steadynorm.kernels", "steadynorm.nn"
NOT_TORCH = ("keras", "tensorflow", "jax", "flax", KERAS, JAX)
# All that is not a layer or its ground is a tool, and stands on the layers.
TOOLS = tuple(
    f"steadynorm.{path.stem}"
    for path in sorted(PACKAGE.iterdir())
    if path.stem not in {"statistics", "kernels", "nn", "keras", "jax"}
    and not path.stem.startswith("_")  # _extras.py, which all may use
    and (path.is_dir() or path.suffix == ".py")
)

FORBIDDEN = {
    "statistics": (*FRAMEWORKS, KERNELS, NN, KERAS, JAX, *TOOLS),
    "kernels": (*NOT_TORCH, NN, *TOOLS),
    "nn": (*NOT_TORCH, *TOOLS),
    "keras": ("torch", "flax", KERNELS, NN, JAX, *TOOLS),
    "jax": ("torch", "keras", "tensorflow", KERNELS, NN, KERAS, *TOOLS),
}
# What of the kernels names no framework: Keras and JAX stand on it too.
SHARED = tuple(f"{KERNELS}.{name}" for name in ("reference", "activations", "checks"))
SHARED_FILES = ("kernels/reference/__init__.py", "kernels/activations.py", "kernels/checks.py")
# PyTorch's side of the reference lies in its folder and is for PyTorch alone.
OF_TORCH = tuple(f"{KERNELS}.reference.{name}" for name in ("torch_arrays", "closed_form"))
FORBIDDEN |= dict.fromkeys(SHARED_FILES, FORBIDDEN["statistics"])
ALLOWED = dict.fromkeys(("keras", "jax", *SHARED_FILES), SHARED)


# Imports --------------------------------------------------------------------------------------


def imported(source: str, module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, at any depth, `importlib` with a literal too."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            name = getattr(function, "id", getattr(function, "attr", ""))
            if name in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield str(first.value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def forbidden_imports(
    source: str, module: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()
) -> list[str]:
    return [
        f"{module} imports {name}"
        for name in imported(source, module)
        if any(within(name, no) for no in forbidden)
        and (any(within(name, no) for no in OF_TORCH) or not any(within(name, a) for a in allowed))
    ]


def modules(folder: str) -> Iterator[tuple[str, Path]]:
    place = PACKAGE / folder
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield dotted, path


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_obey_the_law(folder: str) -> None:
    complaints = []
    for module, path in modules(folder):
        law = FORBIDDEN[folder], ALLOWED.get(folder, ())
        complaints += forbidden_imports(path.read_text(encoding="utf-8"), module, *law)
    assert complaints == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn as anything",
        "from torch import Tensor",
        "def late():\n    import torch",
        "if TYPE_CHECKING:\n    from torch import Tensor",
        "importlib.import_module('torch.nn')",
        "__import__('torch')",
        "from steadynorm import nn",
        "from .. import nn",
        "from ..nn import functional",
        "from steadynorm.cli import app",
    ],
)
def test_a_forbidden_import_is_seen(source: str) -> None:
    law = FORBIDDEN["statistics"]
    assert forbidden_imports(source, "steadynorm.statistics.moments", law) != []


@pytest.mark.parametrize(
    "source", ["import torchlike", "from .moments import Moments", "from . import running", "torch"]
)
def test_an_allowed_import_is_left_alone(source: str) -> None:
    law = FORBIDDEN["statistics"]
    assert forbidden_imports(source, "steadynorm.statistics.running", law) == []


def test_keras_and_jax_may_import_of_the_kernels_what_names_no_framework() -> None:
    law = FORBIDDEN["jax"], ALLOWED["jax"]
    for source, complains in (
        ("from steadynorm.kernels.reference import Reference", False),
        ("from steadynorm.kernels import activations", False),
        ("from steadynorm.kernels.reference import torch_arrays", True),
        ("from steadynorm.kernels.reference.torch_arrays import reference", True),
        ("import steadynorm.kernels", True),
    ):
        assert bool(forbidden_imports(source, "steadynorm.jax.functional", *law)) is complains


# Arithmetic on tensors of the input's size ----------------------------------------------------

INPUT_SIZED = {"input", "x", "residual", "grad", "grad_output", "output", "y", "mask"}
# Ways to look at a tensor without computing on it: the result is still of the input's size.
VIEWS = {
    *("to", "type", "float", "double", "half", "bool", "contiguous", "detach", "clone"),
    *("reshape", "view", "transpose", "permute", "movedim", "flatten", "unflatten", "squeeze"),
    *("unsqueeze", "expand", "expand_as", "broadcast_to", "requires_grad_"),
}
COMPUTES = {
    *("sum", "mean", "var", "var_mean", "std", "std_mean", "norm", "vector_norm", "prod", "amax"),
    *("nansum", "nanmean", "cumsum", "add", "sub", "mul", "div", "pow", "square", "sqrt", "rsqrt"),
    *("addcmul", "addcdiv", "lerp", "exp", "log", "abs", "neg", "reciprocal", "clamp", "where"),
    *("masked_fill", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "elu", "sigmoid"),
    *("tanh", "einsum", "matmul", "dot", "batch_norm", "native_batch_norm", "normalize"),
}
COMPUTES |= {f"{name}_" for name in COMPUTES}


class ArithmeticFinder(ast.NodeVisitor):
    """Operators, and calls named in `COMPUTES`, on what one can tell is of the input's size.

    That is: the names in `INPUT_SIZED`, views and slices of them, and local names bound to such.
    A tensor that travels through a container, an attribute or another function is not followed;
    for those stands the reviewer.
    """

    def __init__(self) -> None:
        self.sized = set(INPUT_SIZED)
        self.found: list[str] = []

    def is_sized(self, node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name):
                return name in self.sized
            case ast.Subscript(value=value) | ast.NamedExpr(value=value):
                return self.is_sized(value)
            case ast.Call(func=ast.Attribute(value=value, attr=attr)):
                return attr in VIEWS and self.is_sized(value)
            case ast.BinOp(left=left, right=right):
                return self.is_sized(left) or self.is_sized(right)
            case ast.UnaryOp(operand=operand):
                return self.is_sized(operand)
            case ast.IfExp(body=body, orelse=orelse):
                return self.is_sized(body) or self.is_sized(orelse)
        return False

    def complain(self, node: ast.expr | ast.stmt) -> None:
        self.found.append(f"line {node.lineno}: {ast.unparse(node)}")

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.is_sized(node.value):
            self.sized |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # `mask | other` joins masks or types; both are wiring.
        if not isinstance(node.op, ast.BitOr) and self.is_sized(node):
            self.complain(node)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.Not) and self.is_sized(node):
            self.complain(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if self.is_sized(node.target) or self.is_sized(node.value):
            self.complain(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Attribute(value=value, attr=attr) if attr in COMPUTES:
                by_library = ast.unparse(value).split(".")[0] in {"torch", "F"}
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                if self.is_sized(value) or (by_library and any(map(self.is_sized, arguments))):
                    self.complain(node)
        self.generic_visit(node)


def arithmetic_on_inputs(source: str) -> list[str]:
    finder = ArithmeticFinder()
    finder.visit(ast.parse(source))
    return finder.found


def wiring() -> list[Path]:
    """The files that pass tensors of the input's size on, and must not compute with them."""
    # In `arrays.py` stands what the reference asks of an array library.
    others = [p for home in ("jax", "keras") for p in (PACKAGE / home).rglob("*.py")]
    return [
        *sorted((PACKAGE / "nn").rglob("*.py")),
        *sorted(p for p in others if p.name != "arrays.py"),
        *(PACKAGE / "kernels" / f"{name}.py" for name in ("dispatch", "autograd")),
        PACKAGE / "kernels" / "reference" / "closed_form.py",
    ]


def test_only_kernels_compute_on_tensors_of_the_inputs_size() -> None:
    complaints = [
        f"{path.relative_to(ROOT)} {found}"
        for path in wiring()
        for found in arithmetic_on_inputs(path.read_text(encoding="utf-8"))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    "source",
    [
        "y = x - mean",
        "z = scale * input",
        "z = (x.float() - mean) * scale",
        "x += residual",
        "m = x.mean(0)",
        "m = torch.var_mean(x, dim=0)",
        "y = torch.relu(input=x)",
        "y = F.batch_norm(x, a, b)",
        "flat = input.transpose(0, 1).flatten(1)\ntotal = flat.sum(1)",
        "total = grad[0].sum()",
        "z = -grad",
        "total = mask.sum()",
        "y.mul_(2)",
    ],
)
def test_arithmetic_on_the_input_is_seen(source: str) -> None:
    assert arithmetic_on_inputs(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "n = x.shape[0] * x.shape[2]",
        "n = x.numel() // x.size(1)",
        "m = running_mean * 2",
        "y = eager.apply(x, center, scale, shift)",
        "y = x.to(torch.float32).movedim(1, -1)",
        "if x.dim() != 2 and not x.is_cuda: pass",
        "def f(x: Tensor | None, mask=None): return x[0], x is None",
    ],
)
def test_wiring_is_left_alone(source: str) -> None:
    assert arithmetic_on_inputs(source) == []


# Sizes ----------------------------------------------------------------------------------------

FILE_LIMIT, FUNCTION_LIMIT = 330, 66  # about 300 and 60: a tenth more passes
# "path" or "path function" -> why it is better whole.
BETTER_WHOLE: dict[str, str] = {}


def code_lines(*nodes: ast.AST) -> int:
    """Lines that hold code: no blank line, comment or docstring, so that prose costs nothing."""
    code: set[int] = set()
    text: set[int] = set()
    for inner in (inner for node in nodes for inner in ast.walk(node)):
        first = getattr(inner, "lineno", None)
        if first is None:
            continue
        last = inner.end_lineno or first
        code |= {first, last}
        match inner:
            case ast.Expr(value=ast.Constant(value=str())):
                text |= set(range(first, last + 1))
    return len(code - text)


def oversized(source: str, name: str = "file") -> dict[str, int]:
    """Files and functions (their bodies: a long list of arguments is not a long function)."""
    tree = ast.parse(source)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = {
        # A function inside another is counted by itself.
        f"{name} {node.name}": code_lines(*(p for p in node.body if not isinstance(p, kinds)))
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    }
    long = {place: lines for place, lines in functions.items() if lines > FUNCTION_LIMIT}
    return {name: code_lines(tree), **long} if code_lines(tree) > FILE_LIMIT else long


def test_files_and_functions_are_short() -> None:
    found: dict[str, int] = {}
    for folder in ("src", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found |= oversized(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert {place: lines for place, lines in found.items() if place not in BETTER_WHOLE} == {}
    assert BETTER_WHOLE.keys() <= found.keys(), "an exception that is no longer needed"


GLUE_LIMIT = 700


def test_the_glue_between_layers_and_kernels_stays_thin() -> None:
    """All of kernels/ but what frameworks share and what lies in a backend's folder."""
    own = {"activations.py", "checks.py"}
    files = [path for path in (PACKAGE / "kernels").glob("*.py") if path.name not in own]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert sum(lines.values()) <= GLUE_LIMIT, lines


def test_a_long_file_and_a_long_function_are_seen() -> None:
    def function(body: str) -> str:
        return "def f(a,\n      b):\n" + body

    line = "    x = 1\n"
    assert oversized("x = 1\n" * (FILE_LIMIT + 1)) == {"file": FILE_LIMIT + 1}
    assert oversized(function(line * (FUNCTION_LIMIT + 1))) == {"file f": FUNCTION_LIMIT + 1}
    assert oversized(function(line * FUNCTION_LIMIT)) == {}
    assert oversized(function("    # why\n\n" * 500 + line)) == {}
    assert oversized(function('    """Text.\n' + "    more\n" * 500 + '    """\n')) == {}


# The project speaks of itself alone -----------------------------------------------------------

SPEAKS_OF_ELSEWHERE = {
    "path of one machine": re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt|mnt|srv)/\w"),
    "package registry": re.compile(
        r"https?://[\w.-]*(?:pypi|registry|mirror|wheels|packages)|(?:index-url|find-links|trusted-host)\b"
    ),
}


def elsewhere(text: str) -> list[str]:
    return [
        f"line {number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in SPEAKS_OF_ELSEWHERE.items()
        if pattern.search(line)
    ]


def own_files() -> list[Path]:
    """Sources, tests, docs and the files of the root, but for this one, which must name names."""
    folders = ("src", "tests", "benchmarks", "docs", ".ci")
    inner = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    files = [path for path in [*inner, *sorted(ROOT.iterdir())] if path.is_file()]
    return [path for path in files if path.suffix != ".pyc" and path != Path(__file__).resolve()]


def test_the_project_speaks_of_itself_alone() -> None:
    complaints = []
    for path in own_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # pictures and other binaries
            continue
        complaints += [f"{path.relative_to(ROOT)} {found}" for found in elsewhere(text)]
    assert complaints == []


@pytest.mark.parametrize(
    "text",
    [
        "data = '/home/somebody/digits'",
        "see /root/project/notes.md",
        "pip install --extra-index-url=somewhere x",
        "--find-links wheels/",
        "from https://registry.example.org/simple",
    ],
)
def test_speaking_of_elsewhere_is_seen(text: str) -> None:
    assert elsewhere(text) != []


@pytest.mark.parametrize("text", ["tests/work/file", "/tmp/x", "https://example.org/home/x", "a/b"])
def test_speaking_of_itself_is_left_alone(text: str) -> None:
    assert elsewhere(text) == []
