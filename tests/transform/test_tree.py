"""The rooms of `transform`: which imports which, and what `ir` alone knows."""

import ast
import pathlib

import pytest

from fp8jax.transform._pipeline import PASSES
from fp8jax.transform.ir import CONSTRUCTS

ROOT = pathlib.Path(__file__).parents[2]
TRANSFORM = ROOT / "fp8jax" / "transform"
FILES = sorted(p for p in TRANSFORM.rglob("*.py") if p.parent.name != "ir")
IR = sorted((TRANSFORM / "ir").glob("*.py"))
# From the ground up; "" holds the files that put the rooms together.
ROOMS = ["ir", "call", "analysis", "plan", "lower", "passes", "profile", ""]


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """The modules of `transform` that a file imports, as parts of their names."""
    found = [node for node in nodes(path) if isinstance(node, ast.ImportFrom)]
    names = [node.module.split(".") for node in found if node.module]
    return [name[2:] for name in names if name[:2] == ["fp8jax", "transform"]]


def room_of(path):
    return path.parent.name if path.parent != TRANSFORM else ""


def attributes(path):
    """Those that a file reads, `primitive.name` among them."""
    found = [
        ast.unparse(node) for node in nodes(path) if isinstance(node, ast.Attribute)
    ]
    return {".".join(text.rsplit(".", 2)[-2:]) for text in found}


def reads_parameters(path):
    found = attributes(path)
    return "primitive.name" in found or any(x.endswith(".params") for x in found)


def strings(path):
    constants = [node.value for node in nodes(path) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def test_every_folder_is_a_room():
    folders = {p.name for p in TRANSFORM.iterdir() if any(p.glob("*.py"))}
    assert folders == {*ROOMS} - {""}


@pytest.mark.parametrize("path", [*FILES, *IR], ids=of)
def test_rooms_import_from_the_rooms_below(path):
    here = ROOMS.index(room_of(path))
    for name in imported(path):
        room = name[0] if name and name[0] in ROOMS else ""
        assert ROOMS.index(room) <= here, ".".join(name)


@pytest.mark.parametrize("path", [*FILES, *IR], ids=of)
def test_what_one_room_takes_of_another_is_in_that_ones_list(path):
    """Through its `__init__.py`; passes have none, and only the pipeline reads them."""
    for name in imported(path):
        other = name[0] if name else ""
        if other in {*ROOMS} - {"", "passes", room_of(path)}:
            assert len(name) == 1, ".".join(name)


def test_every_file_among_the_passes_is_in_the_pipeline():
    files = {p.stem for p in (TRANSFORM / "passes").glob("_[a-z]*.py")}
    assert files == {f"_{name}" for name in PASSES}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_one_file_beside_the_others_with_tests_of_its_own(name):
    path = TRANSFORM / "passes" / f"_{name}.py"
    assert PASSES[name].__module__.endswith(f".passes._{name}")
    assert PASSES[name].__name__ == name
    assert not [other for other in imported(path) if other[0] == "passes"]
    assert (ROOT / "tests" / "transform" / "passes" / f"test_{name}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=of)
def test_no_parameter_of_a_primitive_is_read_here(path):
    assert not reads_parameters(path)


@pytest.mark.parametrize("path", FILES, ids=of)
def test_no_construct_is_named_here(path):
    # Of name stacks, which hold names of transformations, not of primitives.
    scopes = {"_found_rules.py", "_phases.py"}
    named = strings(path) & CONSTRUCTS.keys()
    assert not named or path.name in scopes, named


@pytest.mark.parametrize("path", IR, ids=of)
def test_table_knows_nothing_of_the_rest_of_transform(path):
    imports = [node for node in nodes(path) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in imports if node.module.startswith("fp8jax.")}
    assert all(module.startswith("fp8jax.transform.ir.") for module in modules)


def is_any(annotation, aliases):
    """Whether an annotation says nothing: none, `Any`, `object`, or a name for one."""
    if annotation is None:
        return True
    name = ast.unparse(annotation).strip("'\"").rsplit(".", 1)[-1]
    return name in {"Any", "object", *aliases}


def aliases_of_any(paths):
    """Names that a file of the room gives to `Any`, and to such a name."""
    found = set()
    for _ in paths:
        before = len(found)
        for node in (node for path in paths for node in nodes(path)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                if isinstance(node.value, ast.Name | ast.Attribute) and is_any(
                    node.value, found
                ):
                    found |= {x.id for x in targets if isinstance(x, ast.Name)}
        if len(found) == before:
            return found
    return found


def parameters(path):
    """Annotations of a file's functions' parameters, but for `self` and `cls`."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            several = [*args.posonlyargs, *args.args, *args.kwonlyargs]
            several += [x for x in (args.vararg, args.kwarg) if x is not None]
            for x in several:
                if x.annotation is not None or x.arg not in ("self", "cls"):
                    yield x.annotation


def test_fewer_than_one_parameter_in_ten_says_nothing_of_its_type():
    """What stays are pytrees, frameworks' objects, and what a user's function takes."""
    aliases = aliases_of_any([*FILES, *IR])
    known = [x for path in (*FILES, *IR) for x in parameters(path)]
    assert sum(is_any(x, aliases) for x in known) < 0.1 * len(known)


def test_what_the_tests_look_for_is_there_to_be_found():
    assert reads_parameters(TRANSFORM / "ir" / "_constructs.py")
    assert "scan" in strings(TRANSFORM / "ir" / "_table.py")
