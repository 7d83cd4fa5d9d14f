"""What the plain step donates, the transformed one donates, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from fp8jax.transform import fp8_transform

D = 128


pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def arguments():
    return {"up": normal(0, D, D), "down": normal(1, D, D)}, normal(2, 64, D)


def step(params, x):
    def loss(params):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - x))

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), value


class Trainer:
    """A jitted method, of which the trainer itself is static."""

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, params, x):
        return step(params, x)


def timed(fn):
    @functools.wraps(fn)
    def run(*args):
        return fn(*args)

    return run


DONATING = {
    "by number": lambda: jax.jit(step, donate_argnums=0),
    "by name": lambda: jax.jit(step, donate_argnames="params"),
    "inlined": lambda: jax.jit(step, donate_argnums=0, inline=True),
    "a method": lambda: Trainer().step,
    "wrapped by the user": lambda: timed(jax.jit(step, donate_argnums=0)),
    "partial": lambda: functools.partial(
        jax.jit(lambda scale, params, x: step(params, x * scale), donate_argnums=1), 2.0
    ),
}
TRANSFORMED = {
    **{
        name: lambda make=make: fp8_transform(make()) for name, make in DONATING.items()
    },
    "told by number": lambda: fp8_transform(step, donate_argnums=0),
    "told from the end": lambda: fp8_transform(step, donate_argnums=-2),
    "told by name": lambda: fp8_transform(step, donate_argnames=["params"]),
    "told of a partial": lambda: fp8_transform(
        functools.partial(jax.jit(lambda s, params, x: step(params, x * s)), 2.0),
        donate_argnums=0,
    ),
    "twice": lambda: fp8_transform(fp8_transform(jax.jit(step, donate_argnums=0))),
    "a partial twice": lambda: fp8_transform(fp8_transform(DONATING["partial"]())),
    "with statistics": lambda: fp8_transform(
        jax.jit(step, donate_argnums=0), stats=True
    ),
}


def deleted(args):
    return [x.is_deleted() for x in jax.tree.leaves(args)]


@pytest.mark.parametrize("make", DONATING.values(), ids=DONATING)
def test_plain_functions_of_these_tests_donate_their_parameters(make):
    args = arguments()
    make()(*args)
    assert deleted(args) == [True, True, False]


@pytest.mark.parametrize("make", TRANSFORMED.values(), ids=TRANSFORMED)
def test_donated_arguments_are_deleted_in_each_call_and_others_are_not(make):
    fn = make()
    for _ in range(2):  # Warnings are errors: every buffer was of use.
        args = arguments()
        jax.block_until_ready(fn(*args))
        assert deleted(args) == [True, True, False]


def test_donation_reuses_the_memory_of_parameters():
    args = arguments()
    stats = fp8_transform(jax.jit(step, donate_argnums=0)).lower(*args).compile()
    parameters = sum(p.nbytes for p in jax.tree.leaves(args[0]))
    assert stats.memory_analysis().alias_size_in_bytes == parameters


def test_looking_at_a_step_deletes_nothing():
    fn, args = fp8_transform(jax.jit(step, donate_argnums=0)), arguments()
    assert fn.report(*args).fraction == 1.0
    fn.trace(*args)
    compiled = fn.lower(*args).compile()
    assert not any(deleted(args))
    compiled(*args)
    assert deleted(args) == [True, True, False]
    assert fn.report(*args).fraction == 1.0  # Types are all that it reads.


def test_step_that_fails_deletes_nothing():
    def failing(params, x):
        step(params, x)
        raise RuntimeError("no result")

    args = arguments()
    with pytest.raises(RuntimeError, match="no result"):
        fp8_transform(jax.jit(failing, donate_argnums=(0, 1)))(*args)
    assert not any(deleted(args))


def test_donated_buffers_that_no_result_can_take_are_jax_s_warning():
    args = arguments()
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        fp8_transform(jax.jit(step, donate_argnums=1))(*args)


def test_donation_lost_in_a_function_that_is_not_jitted_is_a_warning():
    jitted = jax.jit(step, donate_argnums=0)

    def caller(params, x):
        return jitted(params, x)

    args, fn = arguments(), fp8_transform(caller)
    (note,) = fn.report(*args).notes
    assert note.startswith("step, which it calls, donates nothing")
    with pytest.warns(UserWarning, match=r"\(caller\): step, .*pass donate_argnums="):
        fn(*args)
    assert not any(deleted(args))
    fp8_transform(caller, donate_argnums=0)(*args)
    assert deleted(args) == [True, True, False]
    # JAX itself says nothing where the caller is jitted.
    fp8_transform(jax.jit(caller))(*arguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"donate_argnums": 2}, "arguments params, x; got 2"),
        ({"donate_argnums": -3}, "arguments params, x; got -1"),
        ({"donate_argnames": "parms"}, "arguments params, x; got 'parms'"),
        ({"static_argnames": ["x", "y"]}, "arguments params, x; got 'y'"),
        ({"donate_argnums": 1.5}, "donate_argnums of int, got 1.5"),
        ({"donate_argnames": 1}, "donate_argnames of str, got 1"),
        ({"donate_argnums": 1, "static_argnames": "x"}, "static or as donated"),
    ],
)
def test_arguments_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match="fp8_transform") as caught:
        fp8_transform(step, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("donate", ["all", "all-except-first", "none"])
def test_equinox_donates_what_it_was_told_and_says_nothing(donate):
    eqx = pytest.importorskip("equinox")

    def run(fn):
        args = arguments()
        fn(*args)
        return deleted(args)

    # Functions of their own: JAX warns once for each, and Equinox silences that.
    plain, mine = (
        eqx.filter_jit(lambda params, x: (*step(params, x), x + 1), donate=donate)
        for _ in range(2)
    )
    assert run(fp8_transform(mine)) == run(plain)


def test_equinox_module_that_donates_itself_is_refused():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(D, D, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"^fp8_transform.*filter_jit of a module"):
        fp8_transform(eqx.filter_jit(linear, donate="all"))
    fn = fp8_transform(eqx.filter_jit(lambda layer, x: layer(x), donate="all"))
    fn(linear, jnp.ones(D))
    assert linear.bias.is_deleted()


def test_equinox_donation_of_arguments_without_names_is_refused():
    eqx = pytest.importorskip("equinox")

    def unnamed(params, *args):
        return step(params, *args)

    fp8_transform(eqx.filter_jit(unnamed))
    for donate in ("all", "warn-except-first"):
        with pytest.raises(
            ValueError, match=r"^fp8_transform.*unnamed\(params, \*args"
        ):
            fp8_transform(eqx.filter_jit(unnamed, donate=donate))


def test_equinox_filter_jit_says_what_the_transform_reads():
    eqx = pytest.importorskip("equinox")
    jitted = eqx.filter_jit(step, donate="all-except-first")
    for name in (
        "donate_first",
        "donate_rest",
        "filter_warning",
        "_cached",
        "_dynamic_fun",
    ):
        assert hasattr(jitted, name), f"filter_jit objects lost {name}: _outer_jit"
    assert jitted.__wrapped__ is step


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.up(x))))


def nnx_step(model, optimizer, x, *, scale=1.0):
    def loss(model):
        return jnp.mean(jnp.square(model(x) - x)) * scale

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def nnx_arguments():
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def leaves_of(*modules):
    return jax.tree.leaves(nnx.state(modules))


def nnx_run(fn):
    """What two calls deleted of each first array, and how many steps were taken."""
    modules, x = nnx_arguments(), normal(2, 64, D)
    before = leaves_of(*modules)
    first = float(fn(*modules, x))
    found = [leaf.is_deleted() for leaf in before]
    assert float(fn(*modules, x)) < first
    assert not any(leaf.is_deleted() for leaf in (*leaves_of(*modules), x))
    return found, int(modules[1].step[...])


NNX_OPTIONS = {
    "both": {"donate_argnums": (0, 1)},
    "both by name": {"donate_argnames": ("model", "optimizer")},
    "the model": {"donate_argnums": 0},
    "the optimizer": {"donate_argnames": "optimizer"},
    "none": {},
}


@pytest.mark.parametrize("options", NNX_OPTIONS.values(), ids=NNX_OPTIONS)
def test_nnx_step_donates_every_leaf_that_plain_nnx_does(options):
    found, steps = nnx_run(nnx.jit(nnx_step, **options))
    assert steps == 2
    assert any(found) == bool(options)
    for fn in (
        fp8_transform(nnx.jit(nnx_step, **options)),
        fp8_transform(nnx_step, **options),
        fp8_transform(nnx.jit(nnx_step, graph=False, **options)),
        fp8_transform(timed(nnx.jit(nnx_step, **options))),
    ):
        assert nnx_run(fn) == (found, 2)


def test_nnx_modules_in_a_container_and_by_name_are_donated_and_trained():
    def in_dict(modules, x):
        return nnx_step(modules["model"], modules["optimizer"], x)

    def called(fn):
        def run(model, optimizer, x):
            return fn({"model": model, "optimizer": optimizer}, x)

        return run

    def by_name(fn):
        return lambda model, optimizer, x: fn(x=x, optimizer=optimizer, model=model)

    for wrap, fn, options in (
        (called, in_dict, {"donate_argnums": 0}),
        (by_name, nnx_step, {"donate_argnames": ("model", "optimizer")}),
    ):
        found, _ = nnx_run(wrap(nnx.jit(fn, **options)))
        assert all(found)
        assert nnx_run(wrap(fp8_transform(nnx.jit(fn, **options)))) == (found, 2)


def test_partial_of_an_nnx_step_trains_the_modules_that_it_was_given():
    model, optimizer = nnx_arguments()
    before = leaves_of(model, optimizer)
    jitted = nnx.jit(nnx_step, donate_argnums=(0, 1))
    fn = fp8_transform(functools.partial(jitted, model, optimizer, scale=2.0))
    x = normal(2, 64, D)
    assert fn.report(x).fraction == 1.0
    losses = [float(fn(x)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert int(optimizer.step[...]) == 3
    assert all(leaf.is_deleted() for leaf in before)


def test_nnx_method_that_is_jitted_trains_its_module():
    class Trained(Model):
        @nnx.jit(donate_argnums=(0, 1))
        def train(self, optimizer, x):
            return nnx_step(self, optimizer, x)

    model = Trained(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before, x = model.up.kernel[...], normal(2, 64, D)
    fn = fp8_transform(model.train)
    assert float(fn(optimizer, x)) > float(fn(optimizer, x))
    assert before.is_deleted()


def test_variable_among_an_nnx_step_s_arguments_is_updated_in_place():
    count = nnx.Variable(jnp.zeros((), jnp.int32))

    @nnx.jit(donate_argnames="count")
    def counted(model, x, count):
        count[...] += 1
        return model(x)

    fn, (model, _) = fp8_transform(counted), nnx_arguments()
    before = count[...]
    for _ in range(2):
        fn(model, normal(2, 64, D), count)
    assert int(count[...]) == 2
    assert before.is_deleted()


def test_looking_at_an_nnx_step_and_a_failing_one_delete_nothing():
    def failing(model, optimizer, x):
        nnx_step(model, optimizer, x)
        raise RuntimeError("no result")

    modules, x = nnx_arguments(), normal(2, 64, D)
    before = leaves_of(*modules)
    fn = fp8_transform(nnx.jit(nnx_step, donate_argnums=(0, 1)))
    assert fn.report(*modules, x).fraction == 1.0
    fn.lower(*modules, x)
    with pytest.raises(RuntimeError, match="no result"):
        fp8_transform(nnx.jit(failing, donate_argnums=(0, 1)))(*modules, x)
    assert not any(leaf.is_deleted() for leaf in before)
    assert all(a is b for a, b in zip(before, leaves_of(*modules), strict=True))
    assert int(modules[1].step[...]) == 0


@pytest.mark.parametrize("name", ["cached_partial", "jit_partial"])
def test_partial_application_that_hides_modules_is_refused_with_the_way_out(name):
    modules = nnx_arguments()
    if name == "cached_partial":
        fn = nnx.cached_partial(nnx.jit(nnx_step), *modules)
    else:
        fn = nnx.jit_partial(nnx_step, *modules, graph=False)
    with pytest.raises(
        ValueError, match=rf"^fp8_transform.*{name}.*functools\.partial"
    ):
        fp8_transform(fn)
