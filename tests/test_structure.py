"""The house as the README draws it: imports go down, and the numerical core knows no Ray."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_RAY = ("worlds", "regularizers", "training", "unlearning", "analysis", "report")


def drawn() -> list[str]:
    """The rooms in the order of the README's drawing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Structure\n+```\n(.*?)```", text, flags=re.S)
    return list(re.findall(r"raysae\.(\w+)", block))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package() -> dict[str, set[str]]:
    """What every room and every module beside the rooms imports of the package."""
    found: dict[str, set[str]] = {}
    names = {path.stem for path in (ROOT / "raysae").iterdir()}
    for path in (ROOT / "raysae").rglob("*.py"):
        room = path.relative_to(ROOT / "raysae").parts[0].removesuffix(".py")
        used = {name.split(".")[1] for name in imports(path) if name.startswith("raysae.")}
        found.setdefault(room, set()).update(used & names - {room})
    return found


def test_the_drawing_has_every_room():
    rooms = {p.name for p in (ROOT / "raysae").iterdir() if (p / "__init__.py").is_file()}
    assert set(drawn()) == rooms | {"cli"}


def test_imports_go_down_the_drawing():
    order, used = drawn(), of_package()
    upward = [
        f"{room} imports {other}"
        for i, room in enumerate(order)
        for other in order[:i]
        if other in used[room]
    ]
    assert upward == []


def test_no_imports_go_in_a_circle():
    """Modules that are no room have no place in the drawing: they must not lead back up."""
    assert len(list(TopologicalSorter(of_package()).static_order())) > len(drawn())


@pytest.mark.parametrize("room", WITHOUT_RAY)
def test_the_core_never_imports_ray(room: str):
    files = list((ROOT / "raysae" / room).rglob("*.py"))
    assert files
    for path in files:
        assert [n for n in imports(path) if n.split(".")[0] == "ray"] == [], path


def test_what_the_core_uses_beside_its_rooms_never_imports_ray():
    used, todo, seen = of_package(), list(WITHOUT_RAY), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += used.get(name, ())
    modules = [ROOT / "raysae" / f"{name}.py" for name in seen - set(WITHOUT_RAY)]
    with_ray = [
        path.name
        for path in modules
        if path.is_file() and any(n.split(".")[0] == "ray" for n in imports(path))
    ]
    assert with_ray == []
    assert not seen & {"search", "pool", "store"}
