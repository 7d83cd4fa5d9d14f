"""Experts stored one by one, and stacked as the layers multiply them.

DeepSeek-V3's files hold `experts.17.gate_proj.weight [out, in]` for each expert; a
mixture of experts in this library has one `experts.gate.kernel [experts, in, out]`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.quant import QTensor, contraction_minor

_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_TABLE = "experts"
Table = dict[str, Any]


def stack_experts(
    params: Mapping[str, Any], names: Mapping[str, str] = _NAMES
) -> Table:
    """The tree with one array or QTensor for the same matrix of all experts, exactly.

        experts/17/gate_proj/kernel [k, n]  ->  experts/gate/kernel [experts, k, n]

    for each table called `experts` whose keys are numbers: `nnx.MoE` and `linen.MoE`
    take the result. Codes and scales are copied, never inflated, and lie in memory as
    `quant.contraction_minor` says. Experts are in memory twice while `params` holds
    them: of a large model, stack one layer's table after another.

    Args:
        params: nested tables, as `load(..., layout="flax")` gives them.
        names: what an expert's matrices are called afterwards; others keep their names.

    Raises:
        ValueError: If nothing is stacked, or experts are missing, or differ in what
            they hold, in shape, dtype or tile.

    Source: DeepSeek-V3's README_WEIGHTS.md.
    """

    def stack(where: str, table: Mapping[str, Any]) -> Table | None:
        if not _is_numbered(table):
            return None
        by_number = {str(key): expert for key, expert in table.items()}
        experts = [by_number.get(str(i)) for i in range(len(table))]
        missing = [i for i, expert in enumerate(experts) if expert is None]
        if missing:
            raise ValueError(
                "stack_experts takes experts from 0 on, each once, and nothing else "
                f"beside them, got {sorted(by_number)} in {where}: {missing[0]} is "
                "missing."
            )
        leaves = [_leaves(expert) for expert in experts]
        paths = list(leaves[0])
        for i, other in enumerate(leaves):
            if other.keys() != leaves[0].keys():
                raise ValueError(
                    "stack_experts takes experts that hold the same, got "
                    f"{_shown(paths)} in {where}/0 and {_shown(other)} in {where}/{i}."
                )
        stacked: Table = {}
        for path in paths:
            whole = _stacked(f"{where}/*/{'/'.join(path)}", [x[path] for x in leaves])
            _put(stacked, (names.get(path[0], path[0]), *path[1:]), whole, where)
        return stacked

    return _replaced("stack_experts", params, stack)


def unstack_experts(
    params: Mapping[str, Any], names: Mapping[str, str] = _NAMES
) -> Table:
    """Undoes `stack_experts`, so that `save(..., layout="flax")` writes each expert.

    Args:
        params: nested tables.
        names: as they were given to `stack_experts`.

    Raises:
        ValueError: If there is nothing to take apart, or the leaves of a table called
            `experts` are of different numbers of experts.
    """
    former = {new: old for old, new in names.items()}

    def unstack(where: str, table: Mapping[str, Any]) -> Table | None:
        if _is_numbered(table):
            return None
        leaves = _leaves(table)
        sizes = {path: x.shape[0] if x.ndim else 0 for path, x in leaves.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                "unstack_experts takes leaves of one number of experts, got "
                f"{ {'/'.join(p): size for p, size in sizes.items()} } in {where}."
            )
        experts: Table = {str(i): {} for i in range(next(iter(sizes.values())))}
        for path, x in leaves.items():
            place = former.get(path[0], path[0]), *path[1:]
            for i, expert in enumerate(experts.values()):
                _put(expert, place, jax.tree.map(lambda a, i=i: a[i], x), where)
        return experts

    return _replaced("unstack_experts", params, unstack)


def _replaced(
    name: str,
    params: Mapping[str, Any],
    replace: Callable[[str, Mapping[str, Any]], Table | None],
) -> Table:
    """A copy of the tree, with what `replace` makes of its tables of experts."""
    count = 0

    def copy(where: tuple[str, ...], node: Any) -> Any:
        nonlocal count
        if not isinstance(node, Mapping):
            return node
        made = replace("/".join(where), node) if where[-1:] == (_TABLE,) else None
        if made is not None:
            count += 1
            return made
        return {key: copy((*where, key), child) for key, child in node.items()}

    tree = copy((), params)
    if not count:
        raise ValueError(
            f"{name} found no table {_TABLE!r} to change in a tree of "
            f"{_shown_keys(params)}: take load(..., layout='flax')."
        )
    return tree


def _is_numbered(table: Mapping[Any, Any]) -> bool:
    return any(str(key).isdecimal() for key in table)


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return {
        tuple(jax.tree_util.keystr((k,), simple=True) for k in path): x
        for path, x in pairs
    }


def _stacked(where: str, parts: list[Any]) -> Any:
    kinds = [_kind(x) for x in parts]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                "stack_experts takes experts of one shape, dtype and tile, got "
                f"{kinds[0]} and, of expert {i}, {kind} in {where}."
            )
    whole = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
    return contraction_minor(whole) if isinstance(whole, QTensor) else whole


def _kind(x: Any) -> str:
    tile = f" in tiles of {x.tile}" if isinstance(x, QTensor) else ""
    return f"{x.dtype}{list(x.shape)}{tile}"


def _put(table: Table, path: tuple[str, ...], value: Any, where: str) -> None:
    *tables, leaf = path
    for key in tables:
        table = table.setdefault(key, {})
    if leaf in table:
        raise ValueError(f"{'/'.join(path)} would be there twice in {where}.")
    table[leaf] = value


def _shown(paths: Any) -> str:
    return ", ".join(sorted("/".join(path) for path in paths))


def _shown_keys(params: Mapping[str, Any]) -> str:
    keys = sorted(map(str, params))
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
