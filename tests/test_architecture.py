"""Imports point one way: a room may import only rooms below it, and there are no circles."""

import ast
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "tunefork"

# From the bottom up. A room may import rooms of a lower level, and of its own room.
LEVELS = [
    {"errors", "words", "zo"},  # zo imports no other room: it is usable alone
    {"files", "metrics", "recipe", "batch"},
    {"data", "run"},
    {"tasks", "render", "models"},
    {"methods"},
    {"evaluate"},
    {"train", "report", "export"},
    {"hosted"},
    {"workflows"},
    {"server", "migrate"},
    {"cli"},
]
# tasks.base holds the types that render reads, and tasks.check reads what render made: files of one level.
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tunefork"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tunefork.")}
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(SRC).parts[0].removesuffix(".py"), path)
        for path in sorted(SRC.rglob("*.py"))
        if path.relative_to(SRC).parts[0] not in ("__init__.py", "__main__.py")
    ]


def test_no_room_imports_upward() -> None:
    wrong = [
        f"{path.relative_to(SRC)} imports {other}"
        for room, path in modules()
        for other in imports(path) - {room}
        if other in LEVEL and LEVEL[other] > LEVEL[room]
    ]
    assert wrong == []


def test_every_room_has_its_place() -> None:
    assert {room for room, _ in modules()} <= set(LEVEL)


def test_nothing_swallows_every_error_but_the_edges() -> None:
    broad = [
        str(path.relative_to(SRC))
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
    ]
    assert broad == ["cli/__init__.py", "server/gate.py", "server/worker.py"]  # a command, a request, a worker


def test_nothing_reads_or_writes_pickle() -> None:
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        assert "torch.load" not in text, path
        assert "torch.save" not in text, path
