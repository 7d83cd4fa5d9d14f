"""All that jit was told of a step holds for the transformed one: shardings, layouts,
compiler options, devices, static arguments; what cannot be followed is refused by name.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fp8jax.transform import fp8_transform

D = 128
COMPILED = {"xla_allow_excess_precision": False}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def arguments():  # On the host: no array says where it is to be.
    return {"w": np.asarray(normal(0, D, D))}, np.asarray(normal(1, 8 * D, D))


def step(params, x):
    value, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), value


def on_mesh(*spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P(*spec))


def placed(outputs):
    return jax.tree.map(lambda x: x.sharding, outputs)


def assert_placed_alike(found, wanted):
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), found, wanted
    )
    assert all(jax.tree.leaves(same)), (placed(found), placed(wanted))


SHARDINGS = {
    "all": lambda: {
        "in_shardings": (on_mesh(), on_mesh("data")),
        "out_shardings": ({"w": on_mesh("data")}, on_mesh()),
    },
    "one for each side": lambda: {
        "in_shardings": on_mesh("data"),
        "out_shardings": on_mesh(),
    },
    "of arguments": lambda: {"in_shardings": [{"w": on_mesh(None, "data")}, None]},
    "of results": lambda: {"out_shardings": (on_mesh("data"), None)},
    "donated": lambda: {
        "in_shardings": (on_mesh("data"), on_mesh("data")),
        "out_shardings": (on_mesh("data"), None),
        "donate_argnums": 0,
    },
}


@pytest.mark.parametrize("make", SHARDINGS.values(), ids=SHARDINGS)
def test_shardings_of_arguments_and_results_are_those_of_the_plain_step(make):
    plain = jax.jit(step, **make())
    fn = fp8_transform(plain)
    wanted, found = (run(*arguments()) for run in (plain, fn))
    assert_placed_alike(found, wanted)
    compiled, plain_compiled = (
        run.lower(*arguments()).compile() for run in (fn, plain)
    )
    assert str(compiled.input_shardings) == str(plain_compiled.input_shardings)
    with_statistics, stats = fp8_transform(plain, stats=True)(*arguments())
    assert_placed_alike(with_statistics, wanted)
    assert set(stats["w"]) == {"fprop", "wgrad"}


def test_partition_specs_are_of_the_mesh_in_context():
    options = {"in_shardings": (P(), P("data")), "out_shardings": (P("data"), P())}
    fn = fp8_transform(jax.jit(step, **options))
    with pytest.raises(RuntimeError, match="requires a non-empty mesh"):
        fn(*arguments())
    with jax.set_mesh(on_mesh().mesh):
        params, _ = fn(*arguments())
    assert params["w"].sharding == on_mesh("data")


def test_arrays_committed_elsewhere_and_keywords_are_refused_as_by_jit():
    plain = jax.jit(step, in_shardings=(on_mesh(), on_mesh("data")))
    params, x = arguments()
    elsewhere = jax.device_put(x, on_mesh(None, "data"))
    for fn in (plain, fp8_transform(plain)):
        with pytest.raises(ValueError, match="does not match the sharding on the resp"):
            fn(params, elsewhere)
        with pytest.raises(ValueError, match="does not support kwargs"):
            fn(params, x=x)


def test_products_of_arguments_that_jit_shards_are_split_without_collectives():
    # Nothing but the jit says that x will lie on eight devices.
    options = {"in_shardings": (on_mesh(), on_mesh("data"))}
    plain = jax.jit(lambda params, x: jnp.tanh(x @ params["w"]), **options)
    compiled = fp8_transform(plain).lower(*arguments()).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|permute", compiled)


def test_layouts_of_results_are_kept():
    layout = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    transposed = Layout((0, 1))
    assert layout.layout != transposed
    for wanted in (layout.layout, transposed):
        told = Format(wanted, layout.sharding)
        fn = fp8_transform(jax.jit(step, out_shardings=({"w": told}, None)))
        params, _ = fn(*arguments())
        assert params["w"].format.layout.major_to_minor == wanted.major_to_minor


def test_static_arguments_have_no_part_in_in_shardings():
    def scaled(params, times, x):
        assert times == 2
        return step(params, x * times)

    shardings = on_mesh(), on_mesh("data")
    plain = jax.jit(scaled, static_argnums=1, in_shardings=shardings)
    params, x = arguments()
    wanted = plain(params, 2, x)
    # Told here alone, the jit counts the argument among the others.
    counted = jax.jit(scaled, in_shardings=(shardings[0], None, shardings[1]))
    for fn in (fp8_transform(plain), fp8_transform(counted, static_argnames="times")):
        assert_placed_alike(fn(params, 2, x), wanted)


def jitted_by_jax(fn, **options):
    return jax.jit(fn, **options)


def jitted_by_equinox(fn, **options):
    return pytest.importorskip("equinox").filter_jit(fn, **options)


def partial_of_jitted(fn, **options):
    return functools.partial(jax.jit(lambda _, *args: fn(*args), **options), None)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("jit", [jitted_by_jax, jitted_by_equinox, partial_of_jitted])
def test_compiler_options_reach_the_compiler(jit, tmp_path):
    fn = fp8_transform(jit(step, compiler_options={"xla_dump_to": str(tmp_path)}))
    fn(*map(jax.device_put, arguments()))
    dumped = "".join(p.read_text() for p in tmp_path.glob("*before_optimizations.txt"))
    assert "f8e4m3fn" in dumped
    wrong = fp8_transform(jit(step, compiler_options={"no_such_option": True}))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        wrong(*map(jax.device_put, arguments()))


@pytest.mark.parametrize("whole", [lambda fn: fn, jax.jit], ids=["plain", "jitted"])
def test_compiler_options_of_a_jit_within_are_refused_with_the_way_out(whole):
    inner = jax.jit(step, compiler_options=COMPILED)

    def caller(params, x):
        return inner(params, x)

    fn = fp8_transform(whole(caller))
    for run in (fn, fn.report, fn.lower):
        with pytest.raises(ValueError, match=r"^fp8_transform\(caller\).*jax\.jit\(fn"):
            run(*arguments())
    fp8_transform(jax.jit(lambda p, x: step(p, x), compiler_options=COMPILED))(
        *arguments()
    )


def test_other_errors_of_the_function_are_its_own():
    def failing(params, x):
        raise ValueError("params are too old")

    with pytest.raises(ValueError, match=r"^params are too old"):
        fp8_transform(failing)(*arguments())


@pytest.mark.parametrize("keep_unused", [False, True])
def test_unused_arguments_are_kept_as_told(keep_unused):
    def with_unused(params, x, unused):
        return step(params, x)

    plain = jax.jit(with_unused, keep_unused=keep_unused)
    args = (*arguments(), np.zeros(3, np.float32))
    texts = [run.lower(*args).as_text() for run in (plain, fp8_transform(plain))]
    kept = ["tensor<3xf32>" in text for text in texts]
    assert kept == [keep_unused, keep_unused]


@pytest.mark.parametrize("inline", [False, True])
def test_step_is_inlined_where_it_is_called_as_told(inline):
    plain = jax.jit(step, inline=inline)

    def calls(fn):  # Late inlining marks the call, early inlining leaves none.
        eqns = jax.make_jaxpr(fn)(*arguments()).eqns
        return [e.params["inline"] for e in eqns if e.params.get("name") == "step"]

    found = calls(fp8_transform(plain))
    assert found == calls(plain)
    assert found != calls(jax.jit(step, inline=not inline))


@pytest.mark.parametrize("kind", ["device", "backend"])
def test_device_and_backend_are_kept_and_not_warned_of_again(kind):
    device = jax.devices("cpu")[3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plain = jax.jit(step, **{kind: device if kind == "device" else "cpu"})
    assert_placed_alike(fp8_transform(plain)(*arguments()), plain(*arguments()))


def test_transforming_twice_keeps_the_options():
    options = {"out_shardings": on_mesh(), "compiler_options": COMPILED}
    once = fp8_transform(jax.jit(step, **options), stats=True)
    twice = fp8_transform(once)
    assert_placed_alike(twice(*arguments())[0], once(*arguments())[0])
    assert twice.report(*arguments()).fraction == 1.0


def test_names_of_arguments_stay_in_messages_and_in_the_program():
    fn = fp8_transform(jax.jit(step, in_shardings=(on_mesh(), on_mesh("data"))))
    text = fn.lower(*arguments()).as_text(debug_info=True)
    assert "params['w']" in text
    bound = fp8_transform(jax.jit(functools.partial(step, arguments()[0])), weights="x")
    assert "@jit_step" in bound.lower(arguments()[1]).as_text()


def sums(params, x):
    new, value = step(params, x)
    return jax.lax.pmean(new, "i"), value


def test_pmap_works_and_with_options_is_refused_with_the_way_out():
    params, x = arguments()
    args = {"w": np.stack([params["w"]] * 8)}, x.reshape(8, D, D)
    wanted, value = jax.pmap(sums, "i")(*args)
    fn = fp8_transform(jax.pmap(sums, "i"))
    assert fn.report(*args).fraction == 1.0
    assert_placed_alike(fn(*args), (wanted, value))
    for options in ({"donate_argnums": 0}, {"static_broadcasted_argnums": 1}):
        with pytest.raises(ValueError, match=r"^fp8_transform.*jax\.pmap\(fp8_trans"):
            fp8_transform(jax.pmap(sums, "i", **options))
    inside = jax.pmap(fp8_transform(sums), "i", donate_argnums=0)
    first, _ = inside(*args)
    second, _ = inside(first, args[1])
    assert first["w"].is_deleted()
    assert_placed_alike(second, wanted)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def nnx_step(model, optimizer, times, x):
    assert isinstance(times, int)

    def loss(model):
        return jnp.mean(jnp.square(model(x) - x)) * times

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def in_dict(modules, times, x):
    return nnx_step(modules["model"], modules["optimizer"], times, x)


def by_kernel():
    shardings = {nnx.PathContains("kernel"): on_mesh("data"), ...: on_mesh()}
    return nnx.StateSharding(shardings)


NNX_SHARDINGS = {
    "by path": lambda: (by_kernel(), None, on_mesh("data")),
    "one for each": lambda: (on_mesh(), on_mesh(), on_mesh("data")),
    "one for all": lambda: on_mesh(),
    "a list": lambda: [by_kernel(), None, None],
    "in a container": lambda: (
        {"model": by_kernel(), "optimizer": on_mesh()},
        on_mesh("data"),
    ),
}


@pytest.mark.parametrize("donates", [False, True], ids=["kept", "donated"])
@pytest.mark.parametrize("make", NNX_SHARDINGS.values(), ids=NNX_SHARDINGS)
def test_nnx_modules_are_sharded_as_plain_nnx_does(make, donates):
    told = make()
    one = isinstance(told, tuple) and isinstance(told[0], dict)
    options = {"in_shardings": told, "out_shardings": on_mesh()}
    options |= {"static_argnames": "times", "static_argnums": 1 if one else 2}
    if donates:
        options["donate_argnums"] = 0

    def run(wrap):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        modules = {"model": model, "optimizer": optimizer}
        fn = wrap(nnx.jit(in_dict if one else nnx_step, **options))
        first = modules if one else (model, optimizer)
        before = model.up.kernel[...]
        for _ in range(2):  # The second time, modules lie where the first put them.
            args = (first,) if one else first
            value = fn(*args, 2, normal(0, 8 * D, D))
        deleted = before.is_deleted()
        return deleted, jax.tree.leaves(nnx.state((model, optimizer))), value

    deleted, wanted, value = run(lambda fn: fn)
    found_deleted, found, found_value = run(fp8_transform)
    assert found_deleted == deleted
    assert_placed_alike([*found, found_value], [*wanted, value])


def test_nnx_shardings_that_fit_no_argument_are_refused():
    model = Model(nnx.Rngs(0))
    x = normal(0, 8, D)

    def forward(model, x):
        return model(x)

    for wrong in ((on_mesh(),), ({"up": on_mesh()}, None)):
        with pytest.raises(
            ValueError, match=r"^fp8_transform\(forward\).*in_shardings"
        ):
            fp8_transform(nnx.jit(forward, in_shardings=wrong))(model, x)
    out = nnx.jit(forward, out_shardings=by_kernel())
    with pytest.raises(ValueError, match=r"^fp8_transform\(forward\).*out_shard"):
        fp8_transform(out)
