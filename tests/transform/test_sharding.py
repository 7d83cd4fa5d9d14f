"""Sharded steps: the unsharded numbers, the plain step's shardings and collectives."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, recipes
from fp8jax.ops._partition import Factorization, assign_axes
from fp8jax.transform import fp8_transform

D, HIDDEN, BATCH, TOKENS = 256, 1024, 8, 128  # Eighths are multiples of 128.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, where parameters and batch lie on it, and what hidden values keep."""

    mesh: tuple[int, ...]
    up: Any
    down: Any
    batch: Any
    hidden: Any

    @property
    def axes(self):
        return ("data", "model")[: len(self.mesh)]

    @property
    def params(self):
        return {"up": self.up, "down": self.down}

    def make_mesh(self, axis_type):
        return jax.make_mesh(self.mesh, self.axes, axis_types=(axis_type,) * 2)


LAYOUTS = {
    "data": Layout((8, 1), P(), P(), P("data"), P("data")),
    "fsdp": Layout((8, 1), P(None, "data"), P("data"), P("data"), P("data")),
    "tensor": Layout((1, 8), P(None, "model"), P("model"), P(), P(None, None, "model")),
    "data and tensor": Layout(
        (2, 4),
        P(None, "model"),
        P("model"),
        P("data"),
        P("data", None, "model"),
    ),
    "fsdp and tensor": Layout(
        (2, 4),
        P("data", "model"),
        P("model", "data"),
        P("data"),
        P("data", None, "model"),
    ),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def start():
    params = {"up": normal(0, D, HIDDEN), "down": normal(1, HIDDEN, D)}
    x, y = normal(2, BATCH, TOKENS, D), normal(3, BATCH, TOKENS, D)
    return params, x, y


def keep(x, name):
    """The value as it is; name is `hidden` or `out`."""
    return x


def matmul(x, w, name):
    return x @ w


def train_step(constrain=keep, dot=matmul, gathered=lambda params: params):
    """Plain gradient descent on a two-layer network."""

    def loss_fn(params, x, y):
        params = gathered(params)
        h = jnp.tanh(constrain(dot(x, params["up"], "hidden"), "hidden"))
        out = constrain(dot(h, params["down"], "out"), "out")
        return jnp.mean((out - y) ** 2)

    def step(params, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        return loss, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return step


@functools.cache
def unsharded():
    """The FP8 step's results on one device."""
    return jax.tree.map(np.asarray, fp8_transform(train_step())(*start()))


def collectives(compiled):
    """How many arrays each is of, and how many in a loop's body or a branch."""
    counts = collections.Counter()
    entry = False
    for line in compiled.as_text().splitlines():
        if line and not line[0].isspace():
            entry = line.startswith("ENTRY")
        found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if found:
            arrays = len(re.findall(r"[a-z]\w*\[", found[1]))
            counts[kind_of(found[2]), "once" if entry else "in a loop"] += arrays
    return counts


def kind_of(collective):
    """XLA:CPU sums the plain step's gradients whole, and then takes a part."""
    return "all-reduce" if collective == "reduce-scatter" else collective


# What a device receives of one element. XLA:CPU moves codes as float16 or uint8.
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "f16": 1, "u8": 1, "f8e4m3fn": 1}


def sent(compiled):
    """Bytes of collectives' results by kind; loops' bodies count once."""
    sizes = collections.Counter()
    pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    for results, kind in re.findall(pattern, compiled.as_text()):
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", results):
            count = np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            sizes[kind_of(kind)] += BYTES[dtype] * int(count)
    return sizes


def assert_close(got, wanted):
    """Two FP8 steps that differ in the order of sums.

    A sum of k float32 products moves by at most k 2**-24 of its terms' size when it is
    reordered, here 2**-14. That moves a code by one step, 2**-3 of it at most, where a
    value lies that close to a tie; ties are 2**-4 apart or more, so for at most
    2 * 2**-14 * 2**4 = 2**-9 of values. A gradient's relative error is then at most
    the root of 2**-9 times 2**-3, or 2**-7.5, whatever the number of codes that move.
    """
    loss, grads, params = got
    np.testing.assert_allclose(loss, wanted[0], rtol=2**-14)
    for name in grads:
        error = np.linalg.norm(grads[name] - wanted[1][name])
        assert error <= 2**-7.5 * np.linalg.norm(wanted[1][name])
        size = np.linalg.norm(wanted[1][name])
        moved = np.linalg.norm(params[name] - wanted[2][name])
        # The update, and the rounding of the parameter itself.
        bound = 0.1 * 2**-7.5 * size + 2**-23 * np.linalg.norm(wanted[2][name])
        assert moved <= bound


def check(step, args, transformed=None):
    """Transformed against plain: collectives and shardings; against one device."""
    plain = jax.jit(step)
    fn = jax.jit(transformed) if transformed else fp8_transform(step)
    if transformed is None:
        report = fn.report(*args)
        assert report.fraction == 1.0
        assert len(report.rows) == 5  # dx of the first layer is not needed.
        assert {row.kernel for row in report.rows} == {"xla"}
    wanted = plain.lower(*args).compile()
    compiled = fn.lower(*args).compile()
    allowed, got = sent(wanted), sent(compiled)
    assert allowed, "the plain step has collectives"
    assert got <= allowed
    gathers = "all-gather", "once"  # Codes and scales, for fprop and for dgrad.
    found, most = collectives(compiled), collectives(wanted)
    assert found[gathers] <= 4 * most.pop(gathers, 0)
    del found[gathers]
    assert found <= most
    out = fn(*args)
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), plain(*args), out
    )
    assert all(jax.tree.leaves(same))
    assert_close(out, unsharded())


def place(layout, mesh):
    params, x, y = start()
    put = {
        name: jax.device_put(params[name], NamedSharding(mesh, spec))
        for name, spec in layout.params.items()
    }
    batch = NamedSharding(mesh, layout.batch)
    return put, jax.device_put(x, batch), jax.device_put(y, batch)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_automatic_sharding_adds_no_collective(layout):
    mesh = layout.make_mesh(AxisType.Auto)
    check(train_step(), place(layout, mesh))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sharding_constraints_add_no_collective(layout):
    mesh = layout.make_mesh(AxisType.Auto)
    specs = {"hidden": layout.hidden, "out": layout.batch}

    def constrain(x, name):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[name]))

    check(train_step(constrain), place(layout, mesh))


def explicit_step(layout):
    specs = {"hidden": layout.hidden, "out": layout.batch}

    def dot(x, w, name):
        return jnp.einsum("btd,df->btf", x, w, out_sharding=specs[name])

    def gathered(params):  # Explicit programs say so themselves.
        clash = {name: "data" in str(spec) for name, spec in layout.params.items()}
        whole = {
            name: P(*(None if a == "data" else a for a in spec))
            for name, spec in layout.params.items()
        }
        return {
            name: jax.sharding.reshard(w, whole[name]) if clash[name] else w
            for name, w in params.items()
        }

    return train_step(dot=dot, gathered=gathered)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_explicit_sharding_adds_no_collective(layout):
    mesh = layout.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        check(explicit_step(layout), place(layout, mesh))


@pytest.mark.parametrize(
    ("axis_type", "residual"),
    [(AxisType.Auto, "bf16"), (AxisType.Explicit, "bf16"), (AxisType.Auto, "fp8")],
)
def test_forward_inside_grad_adds_no_collective(axis_type, residual):
    layout = LAYOUTS["data and tensor"]
    mesh = layout.make_mesh(axis_type)

    def forward(params, x):
        h = jnp.tanh(jnp.einsum("btd,df->btf", x, params["up"]))
        sharding = layout.batch if axis_type == AxisType.Explicit else None
        return jnp.einsum("btf,fd->btd", h, params["down"], out_sharding=sharding)

    def step_of(forward):
        def step(params, x, y):
            def loss_fn(params):
                return jnp.mean((forward(params, x) - y) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(params)
            return loss, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        return step

    with jax.set_mesh(mesh):
        args = place(layout, mesh)
        fp8_forward = fp8_transform(forward, recipes.deepseek_v3(residual=residual))
        check(step_of(forward), args, step_of(fp8_forward))


def test_shardings_of_a_jitted_step_are_those_of_the_transformed_one():
    layout = LAYOUTS["fsdp"]
    mesh = layout.make_mesh(AxisType.Auto)
    here = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    params = {name: here(spec) for name, spec in layout.params.items()}
    step = jax.jit(
        train_step(),
        in_shardings=(params, here(P("data")), here(P("data"))),
        out_shardings=(here(P()), params, {name: here(P()) for name in params}),
    )
    fn = fp8_transform(step)
    assert sent(fn.lower(*start()).compile()) <= sent(step.lower(*start()).compile())
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
        step(*start()),
        fn(*start()),
    )
    assert all(jax.tree.leaves(same))


def test_outer_jit_of_sharded_arguments_adds_no_collective():
    # Only types can be seen in its trace, and automatic shardings are in none.
    args = place(LAYOUTS["fsdp"], LAYOUTS["fsdp"].make_mesh(AxisType.Auto))
    check(train_step(), args, fp8_transform(train_step()))


def layer(params, x):
    return jnp.tanh(x @ params["up"])


def layer_step(params, x):
    def loss(params):
        return jnp.mean(layer(params, x) ** 2)

    return jax.tree.map(jnp.subtract, params, jax.grad(loss)(params))


@pytest.mark.parametrize("fn", [layer, layer_step])
def test_vmap_of_sharded_products_is_that_of_each_entry(fn):
    fp8_fn = fp8_transform(fn)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x = {"up": normal(0, 3, D, HIDDEN)}, normal(1, 3, 8 * TOKENS, D)
    each = [fp8_fn(jax.tree.map(lambda p, i=i: p[i], params), x[i]) for i in range(3)]
    wanted = jax.tree.map(lambda *entries: jnp.stack(entries), *each)
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    mapped = jax.vmap(fp8_fn)
    crossed = jax.vmap(jax.vmap(fp8_fn, (None, 0)), (0, None))(params, sharded)
    diagonal = jax.tree.map(lambda a: jnp.stack([a[i, i] for i in range(3)]), crossed)
    # For wgrad, devices may add tokens up in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    for found in (mapped(params, sharded), jax.jit(mapped)(params, sharded), diagonal):
        jax.tree.map(close, found, wanted)


def test_layer_of_sharded_arguments_without_the_transform_adds_no_collective():
    def forward(dot):
        def run(params, x):
            dims = (((2,), (0,)), ((), ()))
            h = jnp.tanh(dot(x, params["up"], dims))
            return dot(h, params["down"], dims)

        return jax.jit(run)

    params, x, _ = place(LAYOUTS["data"], LAYOUTS["data"].make_mesh(AxisType.Auto))
    compiled = forward(fp8jax.dot_general).lower(params, x).compile()
    allowed = forward(jax.lax.dot_general).lower(params, x).compile()
    assert collectives(compiled) <= collectives(allowed)


def sharded_step(layout, mesh, check_vma):
    """The step on every device's own part, with collectives written by hand."""
    fsdp = "data" in str(layout.up)

    def loss_fn(params, x, y):
        if fsdp:
            up = jax.lax.all_gather(params["up"], "data", axis=1, tiled=True)
            down = jax.lax.all_gather(params["down"], "data", tiled=True)
            params = {"up": up, "down": down}
        out = jnp.tanh(x @ params["up"]) @ params["down"]
        if "model" in str(layout.up):
            out = jax.lax.psum(out, "model")
        loss = jnp.mean((out - y) ** 2)
        return jax.lax.pmean(loss, "data") if check_vma else loss

    def step(params, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        if not check_vma:
            loss, grads = jax.lax.pmean((loss, grads), "data")
        return loss, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    if mesh.shape["model"] == 1:
        # An axis of one device would have to be named in every sum.
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(layout.params, layout.batch, layout.batch),
        out_specs=(P(), layout.params, layout.params),
        check_vma=check_vma,
    ), mesh


@pytest.mark.parametrize("name", ["data", "fsdp", "data and tensor", "unchecked"])
def test_shard_map_bodies_are_in_fp8_and_add_no_collective(name):
    layout = LAYOUTS["data" if name == "unchecked" else name]
    mesh = layout.make_mesh(AxisType.Auto)
    step, mesh = sharded_step(layout, mesh, check_vma=name != "unchecked")
    args = place(layout, mesh)
    check(step, args)
    rows = fp8_transform(step).report(*args).rows
    assert {row.count for row in rows} == {8}  # Once a shard, of a shard's size.
    tokens = BATCH * TOKENS // mesh.shape["data"]
    features = HIDDEN // dict(mesh.shape).get("model", 1)
    fprop = next(row for row in rows if row.role == "fprop")
    assert (fprop.m, fprop.n, fprop.k) == (tokens, features, D)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_some_axes_leaves_the_others_to_the_partitioner(check_vma):
    layout = LAYOUTS["data and tensor"]
    mesh = layout.make_mesh(AxisType.Auto)
    plain = train_step()

    def local(params, x, y):
        if check_vma:  # Gradients of shared parameters are sums already.
            params = jax.lax.pcast(params, "data", to="varying")
        loss, grads, _ = plain(params, x, y)
        loss, grads = jax.lax.pmean((loss, grads), "data")
        return loss, grads

    def step(params, x, y):
        loss, grads = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
            axis_names={"data"},
            check_vma=check_vma,
        )(params, x, y)
        return loss, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    check(step, place(layout, mesh))


def test_scan_over_layers_with_remat_adds_no_collective_to_its_body():
    mesh = LAYOUTS["tensor"].make_mesh(AxisType.Auto)

    def step(params, x, y):
        @jax.checkpoint
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        def loss_fn(params):
            return jnp.mean((jax.lax.scan(layer, x, params)[0] - y) ** 2)

        return jax.value_and_grad(loss_fn)(params)

    params, x, y = start()
    params = jax.tree.map(lambda w: jnp.stack([w] * 2), params)
    specs = {"up": P(None, None, "model"), "down": P(None, "model")}
    args = (
        {
            k: jax.device_put(w, NamedSharding(mesh, specs[k]))
            for k, w in params.items()
        },
        *(jax.device_put(v, NamedSharding(mesh, P())) for v in (x, y)),
    )
    fn = fp8_transform(step)
    assert fn.report(*args).fraction == 1.0
    allowed = collectives(jax.jit(step).lower(*args).compile())
    assert collectives(fn.lower(*args).compile()) <= allowed
    assert any(where == "in a loop" for _, where in allowed)


def test_shards_that_cut_tiles_stay_local_and_quantize_no_coarser():
    # Shards of 32: each begins its own tiles, rather than gather its neighbours'.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 64, D), normal(1, D, D)
    args = (
        {"w": jax.device_put(w, NamedSharding(mesh, P("data")))},
        jax.device_put(x, NamedSharding(mesh, P(None, "data"))),
    )

    def forward(params, x):
        return x @ params["w"]

    fn = fp8_transform(forward)
    allowed = collectives(jax.jit(forward).lower(*args).compile())
    assert collectives(fn.lower(*args).compile()) <= allowed
    whole = fp8jax.numerics.sqnr_db(fn({"w": w}, x), x @ w)
    # More scales for the same values are no worse, up to how they happen to fall: well
    # under one bit of the codes, 6 dB.
    assert fp8jax.numerics.sqnr_db(fn(*args), x @ w) > whole - 1


def test_products_summed_over_devices_are_added_in_the_dtype_of_the_plain_sums():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 64, HIDDEN), normal(1, HIDDEN, D)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    fn = jax.jit(lambda x, w: fp8jax.dot_general(x, w, dims))
    got = fn(
        jax.device_put(x, NamedSharding(mesh, P(None, "data"))),
        jax.device_put(w, NamedSharding(mesh, P("data"))),
    )
    assert got.dtype == jnp.bfloat16
    exact = functools.partial(fp8jax.dot_general, preferred_element_type=jnp.float32)
    parts = [
        np.asarray(exact(x[:, k : k + 128], w[k : k + 128], dims), np.float64)
        for k in range(0, HIDDEN, 128)
    ]
    # Each device's part is rounded once, by 2**-8 of it at most, and so is each of the
    # seven sums, none of which exceeds the sum of magnitudes.
    bound = 8 * 2**-8 * np.sum(np.abs(parts), 0)
    assert (np.abs(np.asarray(got, np.float64) - np.sum(parts, 0)) <= bound).all()


def pretend_hopper(monkeypatch):
    """The GPU kernels are there, and are XLA's under another name."""
    xla = _dispatch._marked

    def available(name):
        return None

    def marked(op, name):
        return xla(op, "xla")

    monkeypatch.setattr(_dispatch, "check_available", available)
    monkeypatch.setattr(_dispatch, "_marked", marked)


def test_gpu_kernels_run_on_the_shards_of_sharded_arrays(monkeypatch):
    pretend_hopper(monkeypatch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    step = train_step()
    params, x, y = start()

    def kernels(fn, *args):
        found = fp8_transform(fn).report(*args).rows
        return {(row.kernel, row.reason) for row in found}

    ours = {("mosaic_gpu", "")}
    assert kernels(step, params, x, y) == ours
    assert kernels(step, params, jax.device_put(x, rows), y) == ours
    everywhere = NamedSharding(mesh, P())
    jitted = jax.jit(step, in_shardings=(everywhere, rows, rows))
    assert kernels(jitted, params, x, y) == ours
    # A shard_map's body is each device's own.
    layout = LAYOUTS["data"]
    for check_vma in (False, True):
        auto = layout.make_mesh(AxisType.Auto)
        local, _ = sharded_step(layout, auto, check_vma)
        assert kernels(local, *place(layout, mesh)) == ours


def test_whoever_says_that_arrays_are_sharded_products_are_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    params, x, y = start()
    typed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)

    def constrain(v, name):
        return jax.lax.with_sharding_constraint(v, rows)

    def partitioned(step, *args):
        return str(fp8_transform(step).trace(*args).jaxpr).count("custom_partitioning[")

    everywhere = NamedSharding(mesh, P())
    jitted = jax.jit(train_step(), in_shardings=(everywhere, rows, rows))
    assert partitioned(train_step(), params, x, y) == 0
    for step, batch, alone in (
        (train_step(), jax.device_put(x, rows), False),
        (train_step(), typed, False),
        # The axis may be one that splits features: an eighth of 256 cuts tiles.
        (train_step(constrain), x, True),
        (jitted, x, False),
    ):
        # Five products that quantize, or five and their quantizations.
        found = partitioned(step, params, batch, y)
        assert found == 5 if alone else found > 5
    with jax.set_mesh(mesh):
        assert partitioned(train_step(), params, x, y) == 5


def test_reports_say_what_split_products_do_without():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x, y = start()
    step = fp8_transform(train_step())
    assert step.report(params, x, y).notes == ()
    batches, features = (
        NamedSharding(mesh, P("data")),
        NamedSharding(mesh, P(None, "data")),
    )
    batch = jax.device_put(x, batches)
    assert step.report(params, batch, y).notes == ()
    # An axis of features, which cuts tiles of the 256 that both products read.
    split = {name: jax.device_put(w, features) for name, w in params.items()}
    (note,) = step.report(split, x, y).notes
    assert note.startswith("5 products of sharded arrays quantize for themselves")
    # One of batches, by which weights are gathered.
    assert step.report(split, batch, y).notes == ()


@pytest.mark.parametrize(
    ("hidden", "parameters", "batch", "alone"),
    [
        (1024, P(None, "x"), P("x"), 0),
        (704 * 8, P(None, "x"), P("x"), 0),  # FSDP: shards of 5.5 tiles are gathered.
        # Tensor parallelism multiplies them: fprops and the dgrad read blocks.
        (704 * 8, P(None, "x"), P(), 3),
        (1024, P(None, "x"), P(), 0),
        # Each device has 8 rows of each sequence: wgrad's tiles would be cut.
        (1024, P(), P(None, "x"), 2),
    ],
)
def test_products_quantize_for_themselves_where_shards_may_cut_their_tiles(
    hidden, parameters, batch, alone
):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def typed(shape, spec):
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    params = {
        "up": typed((1024, hidden), parameters),
        "down": typed((hidden, 1024), parameters),
    }
    x = typed((16, 64 if batch == P(None, "x") else 1024, 1024), batch)
    report = fp8_transform(train_step()).report(params, x, x)
    assert report.fraction == 1.0
    notes = [note for note in report.notes if "for themselves" in note]
    assert [int(note.split()[0]) for note in notes] == ([alone] if alone else [])


def test_shards_that_cut_tiles_have_the_numbers_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"up": normal(0, D, 88 * 8), "down": normal(1, 88 * 8, D)}
    x, y = normal(2, BATCH, TOKENS, D), normal(3, BATCH, TOKENS, D)
    step = fp8_transform(train_step())
    wanted = jax.tree.map(np.asarray, step(params, x, y))
    rows = NamedSharding(mesh, P("data"))
    layout = {
        "up": NamedSharding(mesh, P(None, "data")),  # Eighths of 5.5 tiles.
        "down": rows,
    }
    got = step(jax.device_put(params, layout), *jax.device_put((x, y), (rows, rows)))
    assert_close(got, wanted)


def test_gradients_are_summed_in_parts_where_each_device_keeps_a_part():
    layout = LAYOUTS["fsdp"]
    mesh = layout.make_mesh(AxisType.Auto)
    params = {name: NamedSharding(mesh, spec) for name, spec in layout.params.items()}
    step = jax.jit(train_step(), out_shardings=(None, params, params))
    text = fp8_transform(step).lower(*place(layout, mesh)).compile().as_text()
    assert len(re.findall(r" reduce-scatter(?:-start)?\(", text)) == 2
    largest = max(
        np.prod([int(n) for n in dims.split(",") if n], dtype=int)
        for dims in re.findall(r"= \(?\w+\[([\d,]*)\].* all-reduce(?:-start)?\(", text)
    )
    assert largest <= 1  # The loss.


@pytest.mark.filterwarnings("ignore:fp8_transform")
def test_ragged_products_keep_their_guard_and_the_call_warns_of_it(monkeypatch):
    pretend_hopper(monkeypatch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    x, w = normal(0, 256, 128), normal(1, 4, 128, 128)
    sizes = jax.numpy.full(4, 64)

    def forward(w, x):
        return jax.lax.ragged_dot(x, w, sizes)

    transform = functools.partial(fp8_transform, forward, weights=[0])
    alone = transform().report(w, x).rows
    assert {row.kernel for row in alone} == {"mosaic_gpu"}
    spread = jax.device_put((w, x), everywhere)
    found = transform().report(*spread).rows
    assert {(row.kernel, "no rule" in row.reason) for row in found} == {("xla", True)}
    with pytest.warns(UserWarning, match=r"w \(fprop\) run in XLA's emulation"):
        transform().trace(*spread)
    with pytest.warns(UserWarning, match="ragged_dot runs in XLA's emulation"):
        jax.jit(fp8jax.ragged_dot).trace(x, w, sizes)


def test_unclear_explicit_shardings_are_left_alone_and_reported():
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    with jax.set_mesh(mesh):
        params, x, y = place(LAYOUTS["data"], mesh)
        rows = fp8_transform(train_step()).report(params, x, y).rows
    assert {row.reason for row in rows if row.role == "fprop"} == {
        "explicit sharding on a mesh of several axis types"
    }


def test_an_axis_splits_what_two_of_three_arrays_agree_on():
    factors = Factorization.of(2, 2, (((1,), (0,)), ((), ())))
    assert str(factors) == "m0 k0, k0 n1 -> m0 n1"
    none, a = (), ("a",)
    cases = {
        # lhs, rhs, out: name of the dimension that the axis splits.
        ((a, none), (a, none), (a, none)): "m0",  # FSDP: the weight is gathered.
        ((none, a), (a, none), (a, none)): "k0",  # wgrad: summed, then scattered.
        ((none, none), (none, a), (none, a)): "n1",
        ((none, none), (none, none), (a, none)): "m0",
    }
    for specs, name in cases.items():
        axes = assign_axes(factors, *specs)
        assert {n for n, split in axes.items() if split} == {name}
