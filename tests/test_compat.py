"""Every private or version-dependent name of JAX that `_compat` uses, by name.

If one of these fails, a JAX release removed or renamed what is in the test's name, and
the function of `_compat` that is named with it needs a branch.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout
from jax.extend import core

from fp8jax import _compat


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def eqn_of(primitive, fn, *args):
    names = {e.primitive.name: e for e in _compat.open_jaxpr(jaxpr_of(fn, *args)).eqns}
    assert primitive in names, f"{primitive} is now one of {sorted(names)}"
    return names[primitive]


def test_jit_info_of_a_jit_object_holds_its_options():
    def f(x, n, *, name):
        return x

    jitted = jax.jit(f, static_argnums=1, static_argnames="name", donate_argnums=0)
    assert hasattr(jitted, "_jit_info"), "jax.jit objects lost _jit_info: jit_options"
    names = "static_argnums static_argnames donate_argnums donate_argnames keep_unused "
    names += "inline device backend compiler_options_kvs use_resource_env "
    for side in ("in", "out"):
        for what in ("shardings_leaves", "shardings_treedef", "layouts_leaves"):
            names += f"{side}_{what} "
    for name in names.split():
        assert hasattr(jitted._jit_info, name), f"_jit_info lost {name}: jit_options"
    options = _compat.jit_options(jitted)
    assert options is not None
    assert options.static_argnums == (1,)
    assert set(options.static_argnames) >= {"name"}
    assert options.donate_argnums == (0,)
    assert (options.in_shardings, options.out_shardings) == (None, None)
    assert options.others == {}
    assert options.jit is jax.jit
    assert jitted.__wrapped__ is f
    assert _compat.jit_options(f) is None
    assert _compat.jit_options(functools.wraps(jitted)(lambda x, n: x)) is None


def test_jit_options_are_those_that_jit_was_given():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = Format(Layout((1, 0)), sharding)
    told = {"compiler_options": {"a": 1}, "keep_unused": True, "inline": True}
    jitted = jax.jit(
        lambda x, y: x,
        in_shardings=({"a": layout, "b": None}, sharding),
        out_shardings=sharding,
        **told,
    )
    options = _compat.jit_options(jitted)
    assert options is not None
    assert options.in_shardings == ({"a": layout, "b": None}, sharding)
    assert options.out_shardings == sharding
    assert options.others.keys() == told.keys()
    assert options.others["compiler_options"] == {"a": 1}
    same = _compat.jit_options(jax.jit(lambda x: x, **options.others))
    assert same is not None
    assert same.others == options.others


def test_pmapped_functions_tell_what_is_static_and_whether_they_donate():
    def f(x, n):
        return x

    pmapped = jax.pmap(f, static_broadcasted_argnums=1, donate_argnums=0)
    assert _compat.pmap_options(pmapped) == _compat.PmapOptions((1,), True)
    assert _compat.pmap_options(jax.pmap(f)) == _compat.PmapOptions((), False)
    assert _compat.pmap_options(f) is None


def test_operands_that_a_call_donates_are_told():
    def f(x, y):
        return jax.jit(lambda x, y: x + y, donate_argnums=1)(x, y)

    eqn = eqn_of("jit", f, 1.0, 2.0)
    assert _compat.donated_operands(eqn) == [eqn.invars[1]]
    assert _compat.donated_operands(eqn_of("sin", jnp.sin, 1.0)) == []


def test_interpret_mode_of_kernels_is_seen():
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX interprets no Mosaic GPU kernel")
    assert not _compat.interprets_kernels()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        assert _compat.interprets_kernels()
    assert not _compat.interprets_kernels()


def test_scan_equations_tell_constants_from_carries():
    def f(c, x):
        return jax.lax.scan(lambda s, y: (s + y * c, s), x[0], x)

    params = eqn_of("scan", f, 1.0, jnp.ones(3)).params
    known = "num_consts" in params or hasattr(params.get("ft_in"), "unpack")
    assert known, f"scan has neither num_consts nor ft_in.unpack: {sorted(params)}"
    assert _compat.scan_counts(params) == (1, 1)
    assert {"jaxpr", "length"} <= set(params), sorted(params)


def test_while_equations_tell_the_constants_of_condition_and_body():
    def f(a, b, x):
        return jax.lax.while_loop(lambda x: x < a, lambda x: x + b + a, x)

    params = eqn_of("while", f, 1.0, 2.0, 0.0).params
    names = {"cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr"}
    assert names <= set(params), sorted(params)
    assert (params["cond_nconsts"], params["body_nconsts"]) == (1, 2)


def test_jaxprs_are_told_from_all_else_opened_and_given_other_equations():
    closed = jaxpr_of(lambda x: jnp.sin(x) + jnp.arange(3.0), jnp.ones(3))
    assert _compat.is_jaxpr(closed)
    assert not _compat.is_jaxpr("jaxpr")
    inner = _compat.open_jaxpr(closed)
    for name in ("eqns", "invars", "outvars", "constvars"):
        assert hasattr(inner, name), f"jaxprs lost {name}: open_jaxpr"
    assert hasattr(closed, "consts"), "jaxprs lost consts: jaxpr_consts"
    assert hasattr(inner, "replace"), "jaxprs lost replace: with_parts"
    same = _compat.with_parts(closed, eqns=list(inner.eqns))
    assert list(_compat.open_jaxpr(same).eqns) == list(inner.eqns)
    assert len(_compat.jaxpr_consts(closed)) == len(inner.constvars)


def test_equations_have_what_a_rewrite_needs():
    eqn = eqn_of("dot_general", jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 4)))
    for name in ("primitive", "params", "invars", "outvars", "effects", "replace"):
        assert hasattr(eqn, name), f"equations lost {name}: the interpreter"
    assert hasattr(eqn.source_info, "name_stack"), "equations lost their name stack"
    wanted = {"dimension_numbers", "precision", "preferred_element_type"}
    assert wanted <= set(eqn.params), sorted(eqn.params)
    assert eqn.replace(params=eqn.params).invars == eqn.invars
    for name in ("Literal", "Var", "jaxpr_as_fun"):
        assert hasattr(core, name), f"jax.extend.core lost {name}"


def test_name_stacks_mark_forward_backward_and_recomputed_products():
    def f(w, x):
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w))(w, x))

    stacks = set()

    def collect(jaxpr, outer):
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            stack = f"{outer}/{eqn.source_info.name_stack}"
            if eqn.primitive.name == "dot_general":
                stacks.add(stack)
            for value in eqn.params.values():
                if _compat.is_jaxpr(value):
                    collect(value, stack)

    collect(jaxpr_of(jax.grad(f), jnp.ones((4, 4)), jnp.ones((4, 4))), "")
    for mark in ("jvp(", "transpose(jvp(", "rematted_computation"):
        assert any(mark in s for s in stacks), f"no name stack has {mark!r}: {stacks}"


def test_pallas_load_of_mosaic_gpu_is_as_the_version_branch_assumes():
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    assert hasattr(plgpu, "load"), "plgpu lost load: mosaic_load"
    parameters = inspect.signature(plgpu.load).parameters
    assert "layout" in parameters, f"plgpu.load lost layout: {list(parameters)}"
    takes_index = len([p for p in parameters if p in ("idx", "indices")]) > 0
    assert takes_index == (_compat.JAX_VERSION < (0, 11)), list(parameters)


def test_jits_tell_of_each_operand_and_result():
    call = eqn_of("jit", jax.jit(lambda x: (x, x)), 1.0)
    for name in ("in_shardings", "in_layouts", "donated_invars"):
        assert len(call.params[name]) == 1, f"jit counts its operands otherwise: {name}"
    for name in ("out_shardings", "out_layouts"):
        assert len(call.params[name]) == 2, f"jit counts its results otherwise: {name}"


def test_scans_are_told_how_many_operands_and_results_they_have():
    def accumulate(w, xs):
        return jax.lax.scan(lambda s, x: (s + w * x, None), xs[0], xs)

    scan = eqn_of("scan", accumulate, 2.0, jnp.ones(3))
    assert _compat.scan_counts(scan.params) == (1, 1)
    counts = _compat.with_scan_counts(scan.params, 3, 1, 2, 4)
    assert _compat.scan_counts(counts) == (3, 1)
    assert counts.keys() <= scan.params.keys(), "scan counts its operands otherwise"
    if "ft_out" in counts:
        assert [len(part) for part in counts["ft_in"].unpack()] == [3, 1, 2]
        assert [len(part) for part in counts["ft_out"].unpack()] == [1, 4]
    assert _compat.stacked_aval(scan.outvars[0].aval, 3).shape == (3,)


def test_effects_on_mutable_arrays_are_told_from_others():
    def write(x):
        ref = jax.new_ref(x)
        jax.debug.print("{}", x)
        ref[...] = x + 1
        return ref[...]

    found = {
        eqn.primitive.name: _compat.has_input_effects(eqn)
        for eqn in _compat.open_jaxpr(jax.make_jaxpr(write)(1.0)).eqns
        if eqn.effects
    }
    assert found.pop("swap")
    assert not found.get("debug_callback", found.get("debug_print", False))


def test_calls_with_a_gradient_rule_tell_their_name_and_are_called_again():
    @jax.custom_vjp
    def double(x):
        return x * 2

    double.defvjp(lambda x: (double(x), None), lambda _, dy: (dy * 3,))
    identity = jax.custom_jvp(lambda x: x)
    identity.defjvp(lambda p, t: (p[0], t[0]))
    for name in ("custom_vjp_call", "custom_jvp_call"):
        eqn = eqn_of(name, lambda x: identity(double(x)), 1.0)
        assert {"call_jaxpr", "num_consts", "symbolic_zeros"} <= set(eqn.params), (
            sorted(eqn.params)
        )
        assert hasattr(eqn.primitive, "get_bind_params"), "_compat.bind"
    eqn = eqn_of("custom_vjp_call", double, 1.0)
    assert _compat.function_name(eqn) == "double"
    assert jax.grad(lambda x: _compat.bind(eqn, x)[0])(1.0) == 3.0


def test_plain_calls_are_told_from_those_with_options():
    plain = eqn_of("jit", jax.jit(lambda x: x * 2), 1.0)
    assert _compat.is_plain_call(plain.params)
    donating = eqn_of("jit", jax.jit(lambda x: x * 2, donate_argnums=0), 1.0)
    assert not _compat.is_plain_call(donating.params)


def test_private_names_of_sharded_tracing_are_there():
    from jax._src import config, core, named_sharding

    for module, name in (
        (config, "_check_vma"),
        (core, "extend_axis_env_nd"),
        (core, "unmapped_aval"),
        (named_sharding, "UNSPECIFIED"),
    ):
        assert hasattr(module, name), f"{module.__name__} lost {name}"


def test_types_in_a_shard_map_tell_what_varies_and_its_context_is_rebuilt():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")

    def double(x):
        assert _compat.varying_axes(jax.typeof(x)) == {"a"}
        return x * 2

    mapped = jax.shard_map(double, mesh=mesh, in_specs=spec, out_specs=spec)
    eqn = eqn_of("shard_map", mapped, jnp.ones(8))
    assert _compat.manual_axes(eqn.params) == {"a"}
    inner = _compat.open_jaxpr(eqn.params["jaxpr"]).eqns[-1]
    aval = inner.outvars[0].aval
    for context in (
        _compat.TracingContext.of(inner),
        _compat.TracingContext.inside(eqn, varies=True),
    ):
        with context.entered():
            traced = jax.make_jaxpr(lambda x: jax.lax.psum(x, "a"))(aval)
        assert not _compat.varying_axes(traced.out_avals[0])


def test_explicit_shardings_are_told_from_automatic_ones():
    kinds = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
    seen = []
    for kind in kinds:
        mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones(8), jax.sharding.PartitionSpec("a"))
            jax.eval_shape(lambda x: seen.append(_compat.is_explicit(jax.typeof(x))), x)
    assert seen == [True, False]
