"""Constructs and parameters of primitives are known in `transform/ir` alone."""

import ast
import pathlib

import pytest

from fp8jax.transform.ir import CONSTRUCTS

ROOT = pathlib.Path(__file__).parents[2]
TRANSFORM = ROOT / "fp8jax" / "transform"
FILES = sorted(p for p in TRANSFORM.rglob("*.py") if p.parent.name != "ir")
IR = sorted((TRANSFORM / "ir").glob("*.py"))


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def of(path):
    return str(path.relative_to(ROOT))


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


def test_what_the_tests_look_for_is_there_to_be_found():
    assert reads_parameters(TRANSFORM / "ir" / "_constructs.py")
    assert "scan" in strings(TRANSFORM / "ir" / "_constructs.py")
