"""The house's floors: imports go down, privates stay private."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fp8jax"

LEVELS = [
    {"numerics", "_compat", "_described", "_elementwise", "_extras", "_version"},
    {"kernels"},
    {"_dispatch", "_lowered_once"},
    {"quant"},
    {"matmul", "collectives"},
    {"recipes"},
    {"ops"},
    {
        "transform",
        "linen",
        "nnx",
        "optim",
        "checkpoint",
        "checkpoint_policies",
        "diagnostics",
    },
    {"testing", "cli", "__init__", "tune"},
    {"__main__"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
# Rooms that must not know what lies below the operations, or each other.
FORBIDDEN = {"ops": {"kernels", "_dispatch", "_lowered_once"}}
FORBIDDEN |= {room: {"kernels", "_dispatch", *LEVELS[7]} - {room} for room in LEVELS[7]}
FORBIDDEN |= {"recipes": {"kernels", "_dispatch", "matmul"}}
FORBIDDEN |= {"quant": {"kernels"}, "matmul": {"kernels", "collectives"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: pathlib.Path) -> set[str]:
    """Every module name that an import statement of the file may load."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in LEVEL, f"{room} is on no floor: add it to LEVELS"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "fp8jax" or len(parts) == 1 or parts[1] == room:
            continue
        other = parts[1]
        if other not in LEVEL and room == "__init__":
            continue
        assert other in LEVEL, f"{path}: imports {name} from the package itself"
        assert LEVEL[other] <= LEVEL[room], f"{path}: {room} imports {other}, above it"
        assert other not in FORBIDDEN.get(room, ()), f"{path}: {room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_jax_stays_in_compat(path):
    private = [n for n in imported_modules(path) if n.startswith("jax._src")]
    assert not private or path.name == "_compat.py"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.name == "__init__.py" and p.parent != PACKAGE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_packages_only_re_export(path):
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
    body = ast.parse(path.read_text()).body
    for node in [*body]:  # Imports may say which extra they need.
        if isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith(
            "needed_by("
        ):
            body += node.body
            body.remove(node)
    assert all(isinstance(node, allowed) for node in body)


def test_rooms_have_no_import_cycle_within_a_floor():
    edges = {}
    for path in FILES:
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] == "fp8jax" and len(parts) > 1 and parts[1] in LEVEL:
                edges.setdefault(room_of(path), set()).add(parts[1])
    for room, others in edges.items():
        for other in others - {room}:
            assert room not in edges.get(other, ()), f"{room} and {other}: a cycle"


def test_import_pulls_in_no_optional_library():
    import subprocess
    import sys

    code = (
        "import sys, fp8jax; print([m for m in ('flax', 'optax', 'matplotlib', "
        "'safetensors', 'rich', 'torch', 'jax.experimental.pallas') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
