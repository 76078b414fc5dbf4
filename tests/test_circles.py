"""No circle of imports in the package, by its graph of imports from the source."""

from tests.test_house import imported, modules


def import_graph(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """For each module, by its dotted name, those of `sources` that it imports, anywhere in it."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported(source, f"{module}.__init__" if module in packages else module):
            parts = name.split(".")
            prefixes = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
            found = next((prefix for prefix in prefixes if prefix in sources), None)
            if found is not None and found != module:
                graph[module].add(found)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            where = stack.index(module)
            if len(stack) - where > 1:
                found.append(sorted(stack[where:]))
            del stack[where:]

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_there_is_no_circle_of_imports() -> None:
    """Imports inside functions count: a circle that hides in one is a circle."""
    files = dict(modules(""))
    packages = {module.removesuffix(".__init__") for module in files if module.endswith("__init__")}
    sources = {
        module.removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for module, path in files.items()
    }
    graph = import_graph(sources, packages)
    graph["steadynorm"] = set()  # lists the public names for type checkers, and imports none
    assert circles(graph) == []


def test_a_circle_is_seen() -> None:
    sources = {
        "a": "",
        "a.one": "from a import two",
        "a.two": "def late():\n    from .sub import three",
        "a.sub": "",
        "a.sub.three": "import importlib\nimportlib.import_module('a.one')",
        "a.four": "from a.one import anything",
    }
    packages = {"a", "a.sub"}
    assert circles(import_graph(sources, packages)) == [["a.one", "a.sub.three", "a.two"]]
    assert circles(import_graph({**sources, "a.two": ""}, packages)) == []
