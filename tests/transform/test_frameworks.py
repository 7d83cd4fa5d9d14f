"""Flax's ways of writing a step: Linen with a TrainState, NNX pure and in place."""

import itertools

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from fp8jax.recipes import bf16
from fp8jax.transform import fp8_transform

D, HIDDEN = 128, 256
X = jax.random.normal(jax.random.key(0), (64, D))
TARGET = jnp.flip(X, axis=1)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def rows(report):
    return {(r.path, r.role): r.status for r in report.rows}


def falls(losses):
    return all(b < a for a, b in itertools.pairwise(losses))


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.LayerNorm()(x)
        x = flax.linen.gelu(flax.linen.Dense(HIDDEN, name="up")(x))
        return flax.linen.Dense(D, name="head")(x)


def test_linen_train_state_step_trains_with_its_layers_found_by_path():
    model = LinenModel()

    @jax.jit
    def step(state, x):
        def loss(params):
            out = state.apply_fn({"params": params}, x)
            return jnp.mean(jnp.square(out - TARGET))

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    variables = model.init(jax.random.key(1), X)
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-2)
    )
    fn = fp8_transform(step)
    assert rows(fn.report(state, X)) == {
        ("params/up/kernel", "fprop"): "fp8",
        ("params/head/kernel", "fprop"): "skipped",
        ("params/head/kernel", "wgrad"): "skipped",
        ("params/head/kernel", "dgrad"): "skipped",
        ("params/up/kernel", "wgrad"): "fp8",
        # The norm before it has parameters of its own.
        ("params/up/kernel", "dgrad"): "fp8",
    }
    losses = []
    for _ in range(4):
        state, loss = fn(state, X)
        losses.append(float(loss))
    assert falls(losses)
    assert int(state.step) == 4


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, D, rngs=rngs)
        self.activation = jax.nn.gelu

    def __call__(self, x):
        return self.down(self.dropout(self.activation(self.up(x))))


def nnx_step(model, optimizer, x, *, scale=1.0):
    def loss(model):
        return jnp.mean(jnp.square(model(x) - TARGET)) * scale

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def nnx_start():
    model = NnxModel(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


NNX_ROWS = [
    ("up/kernel", "fprop"),
    ("down/kernel", "fprop"),
    ("down/kernel", "wgrad"),
    ("down/kernel", "dgrad"),
    ("up/kernel", "wgrad"),
]


@pytest.mark.parametrize("jitted", [False, True])
def test_nnx_step_trains_its_modules_in_place(jitted):
    fn = fp8_transform(nnx.jit(nnx_step) if jitted else nnx_step)
    model, optimizer = nnx_start()
    before = np.asarray(model.up.kernel[...])
    assert rows(fn.report(model, optimizer, X)) == dict.fromkeys(NNX_ROWS, "fp8")
    losses = [float(fn(model, optimizer, X, scale=2.0)) for _ in range(4)]
    assert falls(losses)
    assert not np.array_equal(before, model.up.kernel[...])
    assert int(optimizer.step[...]) == 4
    assert int(model.dropout.rngs.count[...]) == 4


def test_nnx_step_s_program_can_be_looked_at_without_running_it():
    fn = fp8_transform(nnx_step)
    model, optimizer = nnx_start()
    assert "fp8jax::wgrad" in str(fn.trace(model, optimizer, X).jaxpr)
    assert "fp8jax::wgrad" in fn.lower(model, optimizer, X).as_text()
    assert int(optimizer.step[...]) == 0


def test_nnx_step_equals_the_same_step_by_split_and_merge():
    model, optimizer = nnx_start()
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def pure(state, x):
        model, optimizer = nnx.merge(graph, state)
        loss = nnx_step(model, optimizer, x)
        return nnx.state((model, optimizer)), loss

    fn = fp8_transform(pure)
    assert fn.report(state, X).fraction == 1.0
    state, loss = fn(state, X)
    assert loss == fp8_transform(nnx_step)(model, optimizer, X)
    kernel = state[0]["up"]["kernel"][...]
    np.testing.assert_array_equal(kernel, model.up.kernel[...])


def test_nnx_parameters_of_a_forward_function_are_known_by_their_type():
    model, _ = nnx_start()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(x, rest, params):
        return nnx.merge(graph, params, rest)(x)

    wanted = dict.fromkeys(NNX_ROWS[:2], "fp8")
    assert rows(fp8_transform(forward).report(X, rest, params)) == wanted
    in_place = fp8_transform(lambda model, x: model(x))
    assert rows(in_place.report(model, X)) == wanted


class Seen(nnx.Variable):
    """What a module notes of a call."""


class Noting(NnxModel):
    """Leaves new variables behind, and replaces one."""

    def __call__(self, x):
        y = super().__call__(x)
        self.sow(nnx.Intermediate, "mean", y.mean())
        self.up.seen = Seen(x.sum())
        self.last = self.up.seen
        return y


def arrays_of(*nodes):
    return nnx.to_pure_dict(nnx.state(nodes, nnx.Not(nnx.RngState)))


# Newer versions of Flax prefer `nnx.capture` for it.
@pytest.mark.filterwarnings("ignore:.*sow.*:DeprecationWarning")
@pytest.mark.parametrize("jitted", [False, True])
def test_variables_that_an_nnx_step_leaves_behind_are_those_of_nnx_jit(jitted):
    both = []
    for make in (nnx.jit, lambda f: fp8_transform(f, bf16())):
        model = Noting(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        kernel = model.up.kernel
        fn = make(nnx.jit(nnx_step) if jitted else nnx_step)
        losses = [fn(model, optimizer, X) for _ in range(3)]
        # The user's own objects, and one array that is known by two names.
        assert kernel is model.up.kernel
        assert model.last is model.up.seen
        both.append((losses, arrays_of(model, optimizer)))
    assert "mean" in both[1][1][0]
    chex.assert_trees_all_close(*both, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*sow.*:DeprecationWarning")
def test_step_that_leaves_variables_behind_trains_in_fp8_and_compiled_ahead():
    model = Noting(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    fn = fp8_transform(nnx_step)
    assert fn.report(model, optimizer, X).fraction == 1.0
    assert not hasattr(model, "mean")
    compiled = fn.lower(model, optimizer, X).compile()
    value = compiled(model, optimizer, X)
    assert jax.tree.leaves(nnx.pop(model, nnx.Intermediate))
    assert float(fn(model, optimizer, X)) < float(value)
    assert float(model.last[...]) == pytest.approx(float(X.sum()), rel=1e-5)


def test_nnx_module_placed_array_by_array_keeps_its_structure():
    def grow(model, x):
        model.extra = nnx.Param(x)
        return model(x)

    mesh = jax.make_mesh((1,), ("x",))
    placed = nnx.StateSharding(
        {...: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())}
    )
    fn = fp8_transform(nnx.jit(grow, in_shardings=(placed, None)))
    with pytest.raises(ValueError, match=r"fp8_transform.*changed the structure"):
        fn(nnx_start()[0], X)


@pytest.mark.parametrize("how", ["argnums", "argnames", "below"])
def test_static_arguments_of_nnx_jit_are_python_values(how):
    def step(model, optimizer, x, kind, scale=1):
        assert isinstance(kind, str)
        return nnx_step(model, optimizer, x, scale=len(kind) * scale)

    make = {
        "argnums": lambda: fp8_transform(nnx.jit(static_argnums=(3,))(step)),
        "argnames": lambda: fp8_transform(nnx.jit(static_argnames="kind")(step)),
        "below": lambda: nnx.jit(static_argnums=3)(
            fp8_transform(step, static_argnums=3)
        ),
    }
    losses = [
        float(make[how]()(*nnx_start(), X, kind)) for kind in ("", "two", "doubled")
    ]
    assert losses[0] == 0
    assert losses[2] == pytest.approx(losses[1] * 7 / 3, rel=1e-6)
