"""The house: few rooms, arrows one way, files and functions of a size that one can read, names that their owners declare.

    python tests/test_house.py

prints the figures.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "gradbuffer").rglob("*.py")])
    if "runs" not in path.parts
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
COMPILED = ("compiled", "in_order", "intrinsic", "jit")  # decorators of compiled doors: arguments cost nothing there
ANYONES = {"__init__", "__main__"}


def imports(name):
    """(module, name in it or None) for everything that a file imports from this house."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in FILES else (node.module, alias.name)


def room(name):
    """A file at the root or in the package, or one of the package's folders."""
    return ".".join(name.split(".")[:2])


def arrows(place):
    """dict from place to the set of places that it takes from; place: what a file's name becomes."""
    found = {}
    for name in FILES:
        found.setdefault(place(name), set()).update(place(module) for module, _ in imports(name))
    return {start: ends - {start} for start, ends in found.items()}


def circles(graph):
    """The places that lead back to themselves."""

    def reached(start):
        seen, ahead = set(), [*graph[start]]
        while ahead:
            place = ahead.pop()
            if place not in seen:
                seen.add(place)
                ahead += graph[place]
        return seen

    return [place for place in graph if place in reached(place)]


def declared(name):
    """What a file says in `__all__`; None if it says nothing."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return set(ast.literal_eval(node.value))
    return None


def functions():
    """(file, function, how many parameters) outside compiled doors."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not any(
                word in ast.unparse(decorator) for decorator in node.decorator_list for word in COMPILED
            ):
                given = node.args
                count = len(given.posonlyargs + given.args + given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)
                yield name, node.name, count


def probes():
    """(file, line) of every `hasattr` and `getattr` outside meta modules, which replace torch's own."""
    return [
        (name, node.lineno)
        for name, tree in TREES.items()
        if name != "meta_module"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
    ]


def test_rooms_and_arrows():
    graph = arrows(room)
    assert len(graph) <= 24 and sum(map(len, graph.values())) <= 70
    assert not circles(graph) and not circles(arrows(lambda name: name))


@pytest.mark.parametrize("name", FILES)
def test_names_are_declared_by_their_owners(name):
    for module, imported in imports(name):
        if imported is not None and FILES[module].stem not in ANYONES:
            assert imported in declared(module), f"{name} takes {imported} from {module}"


def test_sizes():
    for name, path in FILES.items():
        assert name == "meta_module" or len(path.read_text().splitlines()) < 500, name
    assert [found for found in functions() if found[2] > 12] == []
    assert len(probes()) <= 12, probes()


if __name__ == "__main__":
    graph = arrows(room)
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, circles: {circles(graph) or 'none'}")
    print(f"{len(FILES)} files, {sum(len(path.read_text().splitlines()) for path in FILES.values())} lines")
    print(f"the most parameters outside compiled doors: {max(functions(), key=lambda found: found[2])}")
    print(f"{len(probes())} calls of hasattr and getattr outside meta_module: {probes()}")
