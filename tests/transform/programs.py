"""Writes what `fp8_transform` makes of a set of programs, to compare before and after.

    PYTHONPATH=. python tests/transform/programs.py BEFORE [--bits] [NAME ...]
    ... change the inside of fp8jax/transform, which is to change no program ...
    PYTHONPATH=. python tests/transform/programs.py AFTER [--bits] [NAME ...]
    diff -r BEFORE AFTER

One file per program: its report as JSON, its jaxpr with name stacks and source lines.
What may differ between two implementations of the same passes is left out: names of
variables and of our own calls, dead code, lines of this library. With `--bits` each
program runs, and its file begins with a digest of its results.
"""

import argparse
import functools
import gc
import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # Not of a test that imports this, and starts processes.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import recipes
from fp8jax.transform import fp8_transform

D, ROWS, LAYERS = 128, 64, 3

Program = tuple[Any, tuple[Any, ...]]  # What `fp8_transform` gave; arguments.
PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[make.__name__] = make
    return make


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


X = normal(9, ROWS, D)
MLP = {"up": normal(0, D, 2 * D), "down": normal(1, 2 * D, D)}
STACK = {"up": normal(2, LAYERS, D, 2 * D), "down": normal(3, LAYERS, 2 * D, D)}
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


def block(layer: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def scanned(stack: Any, x: jax.Array, layer: Any = block) -> jax.Array:
    return lax.scan(lambda x, w: (layer(w, x), None), x, stack)[0]


def sgd(forward: Any) -> Any:
    """A train step; its function has a name, which warnings and jaxprs show."""

    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return step


@program
def mlp_step() -> Program:
    return fp8_transform(sgd(block)), (MLP, X)


@program
def mlp_step_jitted_and_donated() -> Program:
    params = jax.tree.map(jnp.copy, MLP)
    return fp8_transform(jax.jit(sgd(block), donate_argnums=0)), (params, X)


@program
def weight_used_twice() -> Program:
    return fp8_transform(sgd(lambda p, x: block(p, block(p, x)))), (MLP, X)


@program
def gate_and_up_share_their_input() -> Program:
    def forward(p: Any, x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    return fp8_transform(sgd(forward)), ({**MLP, "gate": normal(5, D, 2 * D)}, X)


@program
def nested_jits_and_einsums() -> Program:
    inner = jax.jit(lambda w, x: jnp.einsum("mk,kn->mn", x, w))

    def forward(p: Any, x: jax.Array) -> jax.Array:
        return inner(p["down"], inner(p["up"], x)) + jnp.einsum("mk,kn->mn", x, p["o"])

    return fp8_transform(sgd(forward)), ({**MLP, "o": normal(5, D, D)}, X)


@program
def jit_with_options_of_its_own_stays_a_call() -> Program:
    place = NamedSharding(jax.make_mesh((1,), ("x",), (AxisType.Auto,)), P())
    inner = jax.jit(block, out_shardings=place)
    return fp8_transform(sgd(inner)), (MLP, X)


@program
def jits_that_remat_scan_and_cond_return_as_they_are() -> Program:
    inner = jax.jit(lambda w, x: x @ w)

    def forward(p: Any, x: jax.Array) -> jax.Array:
        x = jax.checkpoint(inner)(p["o"], x)
        x = lax.scan(lambda x, _: (inner(p["o"], x), None), x, None, 2)[0]
        return lax.cond(x[0, 0] > 0, inner, lambda _, x: x, p["o"], x)

    return fp8_transform(sgd(forward)), ({"o": normal(5, D, D)}, X)


@program
def scan_over_layers() -> Program:
    return fp8_transform(sgd(scanned)), (STACK, X)


@program
def scan_over_layers_with_remat() -> Program:
    forward = functools.partial(scanned, layer=jax.checkpoint(block))
    return fp8_transform(sgd(forward)), (STACK, X)


@program
def scan_that_casts_its_weights() -> Program:
    def layer(w: Any, x: jax.Array) -> jax.Array:
        return block(jax.tree.map(lambda a: a.astype(jnp.bfloat16), w), x)

    forward = functools.partial(scanned, layer=layer)
    return fp8_transform(sgd(forward)), (STACK, X.astype(jnp.bfloat16))


@program
def remat_in_a_python_loop() -> Program:
    def forward(p: Any, x: jax.Array) -> jax.Array:
        for layer in p:
            x = jax.checkpoint(block)(layer, x)
        return x

    return fp8_transform(sgd(forward)), ([MLP, jax.tree.map(lambda a: 2 * a, MLP)], X)


@program
def scan_over_microbatches_around_one_over_layers() -> Program:
    step = sgd(functools.partial(scanned, layer=jax.checkpoint(block)))

    def accumulated(params: Any, xs: jax.Array) -> Any:
        def add(total: Any, x: jax.Array) -> Any:
            new, value = step(params, x)
            return jax.tree.map(jnp.add, total, new), value

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)

    return fp8_transform(accumulated), (STACK, jnp.stack([X, X]))


@program
def many_steps_in_one_loop() -> Program:
    step = sgd(block)

    def run(params: Any, x: jax.Array) -> Any:
        return lax.fori_loop(0, 4, lambda _, p: step(p, x)[0], params)

    return fp8_transform(run), (MLP, X)


def looped(p: Any, x: jax.Array) -> jax.Array:
    def more(state: Any) -> jax.Array:
        return jnp.sum(jnp.abs(state[1] @ p["up"])) < 1e9 * (3 - state[0])

    more = more if "condition" in p else lambda state: state[0] < 3
    body = lambda state: (state[0] + 1, block(p, state[1]))  # noqa: E731
    return lax.while_loop(more, body, (0, x))[1]


@program
def while_forward() -> Program:
    return fp8_transform(looped, weights=0), (MLP, X)


@program
def while_measured() -> Program:
    return fp8_transform(looped, weights=0, stats=True), (MLP, X)


@program
def while_whose_condition_multiplies() -> Program:
    params = {**MLP, "condition": jnp.zeros(())}
    return fp8_transform(looped, weights=0, stats=True), (params, X)


@program
def while_in_a_step() -> Program:
    def forward(p: Any, x: jax.Array) -> jax.Array:
        warm = looped(jax.tree.map(lax.stop_gradient, p), lax.stop_gradient(x))
        return block(p, x) + warm

    return fp8_transform(sgd(forward)), (MLP, X)


def branched(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0] > 0, lambda x: block(p, x), lambda x: x @ p["skip"], x)


BRANCHES = {**MLP, "skip": normal(6, D, D)}


@program
def cond_in_a_step() -> Program:
    return fp8_transform(sgd(branched)), (BRANCHES, X)


@program
def cond_measured() -> Program:
    return fp8_transform(sgd(branched), stats=True), (BRANCHES, X)


@program
def forward_function() -> Program:
    return fp8_transform(block), (MLP, X)


@program
def forward_scan_measured() -> Program:
    return fp8_transform(scanned, stats=True), (STACK, X)


@program
def gradient_of_a_forward_function() -> Program:
    fn = jax.jit(jax.grad(lambda p, x: jnp.mean(fp8_transform(block)(p, x) ** 2)))
    return fn, (MLP, X)


@program
def transformed_twice() -> Program:
    return fp8_transform(fp8_transform(sgd(block))), (MLP, X)


@program
def transform_of_the_gradient_of_a_transform() -> Program:
    return fp8_transform(sgd(fp8_transform(block))), (MLP, X)


@program
def measured_step() -> Program:
    return fp8_transform(sgd(block), stats=True), (MLP, X)


@program
def measured_scan_with_remat() -> Program:
    forward = functools.partial(scanned, layer=jax.checkpoint(block))
    return fp8_transform(sgd(forward), stats=True), (STACK, X)


KEPT = recipes.deepseek_v3(residual="fp8")


@program
def residuals_in_fp8() -> Program:
    return fp8_transform(sgd(block), KEPT), (MLP, X)


@program
def residuals_in_fp8_of_a_scan() -> Program:
    return fp8_transform(sgd(scanned), KEPT, stats=True), (STACK, X)


@jax.custom_vjp
def clipped(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def _clipped_backward(residuals: Any, dy: jax.Array) -> Any:
    w, x = residuals
    return jnp.clip(x.T @ dy, -1e-4, 1e-4), dy @ w.T


clipped.defvjp(lambda w, x: (x @ w, (w, x)), _clipped_backward)


@jax.custom_jvp
def scaled(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


@scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3 * (x @ dw) + dx @ w


def ruled(p: Any, x: jax.Array) -> jax.Array:
    return scaled(p["down"], jnp.tanh(clipped(p["up"], x)))


@program
def custom_rules() -> Program:
    return fp8_transform(ruled, custom_rules=["clipped", "scaled"]), (MLP, X)


@program
def custom_rules_measured() -> Program:
    return fp8_transform(ruled, custom_rules=[".*"], stats=True), (MLP, X)


@program
def hand_written_rules_in_a_step() -> Program:
    return fp8_transform(sgd(ruled)), (MLP, X)


def stored(tree: Any) -> Any:
    return jax.tree.map(lambda w: fp8jax.quantize(w, SPEC), tree)


@program
def stored_codes() -> Program:
    return fp8_transform(block), (stored(MLP), X)


@program
def stored_codes_in_a_scan_with_remat() -> Program:
    forward = functools.partial(scanned, layer=jax.checkpoint(block))
    return fp8_transform(forward), (stored(STACK), X)


@program
def stored_codes_by_index() -> Program:
    def forward(stack: Any, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = block(jax.tree.map(lambda w, i=i: w[i], stack), x)
        return x

    return fp8_transform(forward), (stored(STACK), X)


@program
def stored_codes_in_a_while_and_a_cond() -> Program:
    def forward(params: Any, x: jax.Array) -> jax.Array:
        return branched(params["branches"], looped(params["loop"], x))

    args = stored({"branches": BRANCHES, "loop": MLP}), X
    return fp8_transform(forward, weights=0), args


@program
def stored_table_is_read_by_rows() -> Program:
    def forward(p: Any, x: jax.Array) -> jax.Array:
        return block(p, x + p["table"][jnp.arange(ROWS)])

    return fp8_transform(forward), (stored({**MLP, "table": normal(7, 256, D)}), X)


EXPERTS = {"up": normal(11, 4, D, 2 * D), "down": normal(12, 4, 2 * D, D)}
SIZES = jnp.array([16, 0, 40, 8], jnp.int32)


def experts(p: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(lax.ragged_dot(x, p["up"], SIZES))
    return lax.ragged_dot(hidden, p["down"], SIZES)


@program
def ragged_forward() -> Program:
    return fp8_transform(experts), (EXPERTS, X)


@program
def ragged_step() -> Program:
    return fp8_transform(sgd(experts), stats=True), (EXPERTS, X)


@program
def attention_router_and_tied_head() -> Program:
    def loss(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens]
        q, k, v = jnp.split(x @ p["qkv"], 3, -1)
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        x = x + jnp.einsum("bts,bsd->btd", scores, v)
        weight, _ = lax.top_k(x @ p["gate"], 2)
        x = block(p, x) * weight[..., :1]
        return -jnp.mean(jax.nn.log_softmax(x @ p["embed"].T)[..., 0])

    params = {**MLP, "embed": normal(20, 256, D), "qkv": normal(21, D, 3 * D)}
    params["gate"] = normal(22, D, D)
    tokens = jnp.arange(64).reshape(4, 16)
    return fp8_transform(jax.value_and_grad(loss)), (params, tokens)


@program
def optimizer_with_products_and_moments() -> Program:
    def step(state: Any, x: jax.Array) -> Any:
        params, moments = state
        grads = jax.grad(lambda p: jnp.mean(block(p, x) ** 2))(params)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
        update = jax.tree.map(lambda m: m @ (m.T @ m), moments)
        return (jax.tree.map(lambda p, u: p - u, params, update), moments)

    return fp8_transform(step), ((MLP, jax.tree.map(jnp.zeros_like, MLP)), X)


@program
def examples_by_vmap() -> Program:
    gradient = jax.vmap(jax.grad(lambda p, x: jnp.sum(block(p, x))), (None, 0))
    args = MLP, X.reshape(8, -1, D)
    return fp8_transform(gradient, weights=0), args


@program
def nnx_module_updated_in_place() -> Program:
    class Mlp(nnx.Module):
        def __init__(self) -> None:
            self.up, self.down = nnx.Param(MLP["up"]), nnx.Param(MLP["down"])

        def __call__(self, x: jax.Array) -> jax.Array:
            return block({"up": self.up[...], "down": self.down[...]}, x)

    @nnx.jit
    def step(model: Mlp, x: jax.Array) -> jax.Array:
        def loss(model: Mlp) -> jax.Array:
            return jnp.mean(model(x) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return value

    return fp8_transform(step), (Mlp(), X)


def _mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])


@program
def sharded_arguments() -> Program:
    mesh = _mesh(AxisType.Auto)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    params = jax.device_put(STACK, NamedSharding(mesh, P()))
    return fp8_transform(sgd(scanned), stats=True), (params, x)


@program
def explicit_sharding() -> Program:
    mesh = _mesh(AxisType.Explicit)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    params = jax.device_put(MLP, NamedSharding(mesh, P()))
    return fp8_transform(sgd(block), stats=True), (params, x)


@program
def step_in_a_shard_map() -> Program:
    def local(params: Any, x: jax.Array) -> Any:
        params = jax.tree.map(lambda p: lax.pcast(p, "data", to="varying"), params)
        new, value = sgd(scanned)(params, x)
        return jax.tree.map(lambda p: lax.pmean(p, "data"), (new, value))

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    step = jax.shard_map(local, mesh=_mesh(AxisType.Auto), **specs)
    return fp8_transform(step, stats=True), (STACK, X)


def text_of(jaxpr: Any) -> str:
    """A closed jaxpr without what may differ between equal programs."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    wanted = [True] * len(inner.outvars)
    inner, _ = partial_eval.dce_jaxpr(inner, wanted, instantiate=True)
    text = inner.pretty_print(source_info=True, name_stack=True, use_color=False)
    text = re.sub(r"\S*fp8jax/fp8jax/\S*( \(\S+\))?", "fp8jax", text)
    text = re.sub(rf"\S*{re.escape(_PACKAGE)}/\S*( \(\S+\))?", "fp8jax", text)
    text = re.sub(r"\S*/(programs\.py:\S+)", r"\1", text)
    text = re.sub(r"fp8jax(::|_)\w+", "fp8jax", text)
    text = re.sub(r" +#", " #", text)  # Aligned with the longest line.
    # How a scan's operands were nested: kept since JAX 0.12, and nothing reads it.
    text = re.sub(r"\n *ft_(in|out)=.*", "", text)
    return re.sub(r"0x[0-9a-f]+", "0x", text)


_PACKAGE = os.path.dirname(fp8jax.__file__)


def digest(results: Any) -> str:
    arrays = [np.asarray(x) for x in jax.tree.leaves(results)]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--bits", action="store_true", help="run them, too")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or PROGRAMS:
        gc.collect()  # What is shared shall not depend on what came before.
        jax.clear_caches()
        fn, args = PROGRAMS[name]()
        parts = [text_of(fn.trace(*args).jaxpr)]
        if hasattr(fn, "report"):
            parts.insert(0, fn.report(*args).to_json())
        if options.bits:
            parts.insert(0, digest(fn(*args)))
        (options.folder / f"{name}.txt").write_text("\n\n".join(parts) + "\n")
        print(name, len(parts[-1].splitlines()), flush=True)


if __name__ == "__main__":
    main()
