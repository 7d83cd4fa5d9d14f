"""The only place for private JAX imports and for branches on the JAX version."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import config, core, effects, pjit, sharding_impls, source_info_util
from jax._src.interpreters import mlir
from jax._src.named_sharding import UNSPECIFIED
from jax.experimental.layout import Format
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType

JAX_VERSION: tuple[int, ...] = jax.__version_info__

# Whether a Mosaic GPU kernel may change a `jax.Ref` that it is called with.
KERNELS_TAKE_REFS = JAX_VERSION >= (0, 11)


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of a whole reference into registers in `layout`."""
    # Not above: the library must import where no Pallas is.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    if JAX_VERSION < (0, 11):
        return load(ref, (), layout=layout)  # The index was an argument.
    return load(ref, layout=layout)


def mosaic_store(
    ref: Any,
    value: jax.Array,
    layout: Any,
    transforms: tuple[Any, ...] = (),
    *,
    turned: bool = False,
) -> None:
    """`ref[...] = value` without reading what was there.

    The assignment reads it first, which costs as much Python as the store. The
    assembler drops that again.

    Args:
        ref: in shared memory.
        value: in registers in `layout`.
        layout: one of `plgpu.Layout`, or of its reductions.
        transforms: of the reference: a tiling and its swizzle, or none.
        turned: `ref.T[...] = value`, then.
    """
    from jax.experimental.mosaic import gpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    target = ref.T if turned else ref
    store: Any = getattr(plgpu, "store", None)  # Of JAX 0.12.
    if store is not None:
        store(target, value, optimized=bool(transforms))
        return
    if interprets_kernels():
        target[...] = value
        return
    inline: Any = plgpu.inline_mgpu

    @inline(arg_types=(layout, plgpu.RefType(transforms)))
    def write(_: Any, registers: Any, memory: Any) -> None:
        gpu.warpgroup_barrier()  # Around it, as around an assignment.
        if not transforms:
            registers.store_untiled(memory, optimized=False)
        else:
            tiled = gpu.memref_transpose(memory, (1, 0, 3, 2)) if turned else memory
            registers.store_tiled(tiled, swizzle=transforms[-1].swizzle)
        gpu.warpgroup_barrier()

    write(value, ref)


def ask_ptxas_once() -> None:
    """Has Mosaic GPU remember which PTX its assembler takes.

    It asks, by a process of 10 ms, at every cast to or from 8 bits or fewer that it
    lowers: some fifteen in a kernel, conditions included.
    """
    from jax.experimental.mosaic import gpu

    module = getattr(gpu, "fragmented_array", None)
    extension: Any = getattr(getattr(module, "mgpu_lib", None), "_mosaic_gpu_ext", None)
    ask = getattr(extension, "_get_ptxas_isa_version", None)
    if ask is not None and not hasattr(ask, "cache_info"):
        extension._get_ptxas_isa_version = functools.cache(ask)


def interprets_kernels() -> bool:
    """Whether a Mosaic GPU kernel that is traced now runs in Pallas' interpret mode."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


_Jaxpr = TypeVar("_Jaxpr", bound=Jaxpr | ClosedJaxpr)


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The jaxpr without its constants; JAX 0.12 has no other kind."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return inner


def is_jaxpr(x: Any) -> bool:
    """Whether `x` is a jaxpr, with its constants or without."""
    return isinstance(x, (Jaxpr, ClosedJaxpr))


def jaxpr_consts(jaxpr: Any) -> tuple[Any, ...]:
    """The values of `open_jaxpr(jaxpr).constvars`, if the jaxpr holds them."""
    return tuple(getattr(jaxpr, "consts", ()))


def has_input_effects(eqn: Any) -> bool:
    """Whether effects name operands by their numbers, as of mutable arrays."""
    return any(isinstance(e, effects.JaxprInputEffect) for e in eqn.effects)


def with_parts(jaxpr: _Jaxpr, **parts: Any) -> _Jaxpr:
    """`jaxpr` with other `eqns`, `invars` or `outvars`; constants stay."""
    inner, outer = open_jaxpr(jaxpr), cast(Any, jaxpr)
    # What JAX has to lower before it compiles, such as `searchsorted` from 0.12 on. New
    # equations are asked alone: of its own the jaxpr tells.
    old = set(map(id, inner.eqns))
    new = (eqn for eqn in parts.get("eqns", ()) if id(eqn) not in old)
    parts["is_high"] = inner.is_high or any(map(_is_high, new))
    if inner is jaxpr:
        return outer.replace(**parts)
    return outer.replace(jaxpr=inner.replace(**parts))


def _is_high(eqn: Any) -> bool:
    return eqn.primitive.is_high(*(x.aval for x in eqn.invars), **eqn.params)


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """One name in a name stack.

    Attributes:
        text: the name.
        is_derivative: whether JAX put it there for a derivative; a scope's, if not.
    """

    text: str
    is_derivative: bool = False


def names_of(eqn: Any) -> tuple[Name, ...]:
    """An equation's name stack, the outermost name first, without `vmap`."""
    return tuple(
        Name(part.name, isinstance(part, source_info_util.Transform))
        for part in eqn.source_info.name_stack.stack
        if not (isinstance(part, source_info_util.Transform) and part.name == "vmap")
    )


def remat_as_jaxpr() -> contextlib.AbstractContextManager[Any]:
    """Has `jax.checkpoint` traced as an equation that holds a jaxpr.

    With `jax_remat3` it is an object whose jaxpr no equation shows.
    """
    option = getattr(config, "remat3", None)
    return contextlib.nullcontext() if option is None else option(False)


def function_name(call: Any) -> str:
    """The name of the function that a custom_jvp or custom_vjp equation calls."""
    return str(open_jaxpr(call.params["call_jaxpr"]).debug_info.func_name)


def bind(eqn: Any, *operands: Any) -> Any:
    """What an equation computes of other operands, to be differentiated as it would."""
    with eqn.ctx.manager:
        params = eqn.primitive.get_bind_params(eqn.params)
        return eqn.primitive.bind(*operands, **params)


def is_plain_call(params: dict[str, Any]) -> bool:
    """Whether a jit equation says no more than which function it calls."""
    shardings = (*params["in_shardings"], *params["out_shardings"])
    layouts = (*params["in_layouts"], *params["out_layouts"])
    return not (
        any(s is not UNSPECIFIED for s in shardings)
        or any(layout is not None for layout in layouts)
        or any(params["donated_invars"])
        or params["compiler_options_kvs"]
    )


def stacked_aval(aval: Any, length: int) -> Any:
    """The type of `length` arrays of one type, stacked."""
    return core.unmapped_aval(length, 0, aval)


def varying_axes(aval: Any) -> frozenset[str]:
    """Mesh axes along which a value may differ between devices, in a shard_map."""
    known = getattr(aval, "mat", None)
    return frozenset(aval.vma if known is None else known.varying)


def union_of_varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes along which one of the arrays may differ between devices."""
    return frozenset().union(*(varying_axes(jax.typeof(x)) for x in arrays))


def varying_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x`, in a shard_map, as a value that may differ along these axes as well."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(x))))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def is_explicit(aval: Any) -> bool:
    """Whether the sharding is a part of the type."""
    # Under automatic sharding, too, a dot may carry an `out_sharding`: of no meaning.
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ())


_here_only = core.Primitive("fp8jax_here_only")
_here_only.def_impl(lambda x, message: x)
_here_only.def_abstract_eval(lambda x, message: x)


def _lower_here_only(ctx: Any, x: Any, *, message: str) -> list[Any]:
    context = ctx.module_context
    if not context.lowering_parameters.for_export:
        return [x]
    devices = getattr(context.axis_context, "num_devices", None)
    if devices is None:  # In a shard_map.
        mesh = context.axis_context.mesh
        devices = 1 if context.axis_context.manual_axes == {*mesh.axis_names} else 2
    if devices > 1:
        raise NotImplementedError(message)
    return [x]


mlir.register_lowering(_here_only, _lower_here_only)


def here_only(x: jax.Array, message: str) -> jax.Array:
    """`x`; where a program of several devices is exported, NotImplementedError."""
    return _here_only.bind(x, message=message)


def spec_on(mesh: Any, sharding: Any) -> jax.sharding.PartitionSpec:
    """The spec, on `mesh`, of a sharding that may be known by positions alone."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding.spec
    return sharding_impls.parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]


def numbers_of(sharding: Any, rank: int) -> Any:
    """The device of each shard, an array of `rank` dimensions; None if replicated."""
    hlo = sharding._to_xla_hlo_sharding(rank)
    if not hlo.is_tiled():
        return None
    shape = [*hlo.tile_assignment_dimensions()]
    devices = np.array(hlo.tile_assignment_devices()).reshape(shape)
    return devices if devices.ndim == rank else None


def manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """The mesh axes over which a shard_map's body runs on each device by itself."""
    return params.get("newly_manual_axes", frozenset(params["mesh"].axis_names))


@dataclasses.dataclass(frozen=True)
class TracingContext:
    """Where to trace a stand-in for an equation: on its mesh, if types depend on that.

    Attributes:
        mesh: the equation's abstract mesh; None if no type tells of it.
        varies: whether an operand varies over manual axes.
    """

    mesh: Any
    varies: bool

    @classmethod
    def of(cls, eqn: Any) -> "TracingContext":
        mesh = eqn.ctx.cur_abstract_mesh
        manual = getattr(mesh, "manual_axes", ())
        if not manual and not any(is_explicit(v.aval) for v in eqn.outvars):
            return cls(None, False)
        return cls(mesh, any(varying_axes(v.aval) for v in eqn.invars))

    @classmethod
    def inside(cls, shard_map: Any, varies: bool) -> "TracingContext":
        """Of the body of a shard_map equation."""
        mesh = shard_map.params["mesh"]
        mesh = getattr(mesh, "abstract_mesh", mesh)
        types = dict.fromkeys(manual_axes(shard_map.params), AxisType.Manual)
        return cls(mesh.update_axis_types(types), varies)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        if self.mesh is None:
            yield
            return
        manual = [(a, self.mesh.shape[a]) for a in self.mesh.manual_axes]
        axes = core.extend_axis_env_nd(manual)
        # Without operands that vary, results do not, whether shard_map checks or not.
        check = config._check_vma(self.varies)
        with jax.sharding.use_abstract_mesh(self.mesh), axes, check:
            yield


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # Since 0.12.
    return len(consts), len(carry)


def with_scan_counts(
    params: dict[str, Any], consts: int, carry: int, slices: int, stacks: int
) -> dict[str, Any]:
    """What of a scan's parameters says how many operands and results there are."""
    if "num_consts" in params:
        return {"num_consts": consts, "num_carry": carry}  # It counts no others.
    from jax._src import flattree  # pyright: ignore (since 0.12)

    def pack(*sizes: int) -> Any:
        return flattree.pack(tuple(map(flattree.nones, sizes)))

    return {"ft_in": pack(consts, carry, slices), "ft_out": pack(carry, stacks)}


@dataclasses.dataclass(frozen=True)
class JitOptions:
    """What `jax.jit` was told about a function.

    Attributes:
        static_argnums, static_argnames, donate_argnums, donate_argnames: as in
            `jax.jit`, which completes them from the function's signature.
        in_shardings, out_shardings: as in `jax.jit`; None if it was told none.
        others: its other keyword arguments, less those that are the default.
        jit: `jax.jit` or `pjit`, which reads the mesh of `with mesh:` besides.
    """

    static_argnums: tuple[int, ...]
    static_argnames: tuple[str, ...]
    donate_argnums: tuple[int, ...]
    donate_argnames: tuple[str, ...]
    in_shardings: Any
    out_shardings: Any
    others: Mapping[str, Any]
    jit: Callable[..., Any]


_A_JIT: Any = jax.jit(lambda: None)


def jit_options(fn: Any) -> JitOptions | None:
    """The options of a `jax.jit` object; None of any other callable."""
    if not isinstance(fn, type(_A_JIT)):  # `functools.wraps` copies attributes.
        return None
    info: Any = fn._jit_info
    others = {
        name: getattr(info, name)
        for name in ("keep_unused", "inline", "device", "backend")
        if getattr(info, name) != getattr(_A_JIT._jit_info, name)
    }
    if info.compiler_options_kvs:
        others["compiler_options"] = dict(info.compiler_options_kvs)
    return JitOptions(
        static_argnums=tuple(info.static_argnums),
        static_argnames=tuple(info.static_argnames),
        donate_argnums=tuple(info.donate_argnums),
        donate_argnames=tuple(info.donate_argnames),
        in_shardings=_shardings_of_jit(info, "in"),
        out_shardings=_shardings_of_jit(info, "out"),
        others=others,
        jit=pjit.pjit if info.use_resource_env else jax.jit,
    )


def _shardings_of_jit(info: Any, side: str) -> Any:
    """The tree of shardings and layouts, which JAX keeps apart, as the user gave it."""
    shardings = getattr(info, f"{side}_shardings_leaves")
    layouts = getattr(info, f"{side}_layouts_leaves")
    if all(s is UNSPECIFIED or s is None for s in shardings) and not any(layouts):
        return None
    both = [
        s if layout is None else Format(layout, s)
        for s, layout in zip(shardings, layouts, strict=True)
    ]
    return getattr(info, f"{side}_shardings_treedef").unflatten(both)


@dataclasses.dataclass(frozen=True)
class PmapOptions:
    """Which of a pmapped function's arguments are static, and which are donated.

    Attributes:
        static_broadcasted_argnums: as in `jax.pmap`.
        donates: whether any argument is donated.
    """

    static_broadcasted_argnums: tuple[int, ...]
    donates: bool


def pmap_options(fn: Any) -> PmapOptions | None:
    """The options of what `jax.pmap` returns; None of any other callable."""
    if getattr(fn, "__globals__", {}).get("__name__") != jax.pmap.__module__:
        return None
    if not hasattr(fn, "lower"):
        return None
    infer_params = inspect.getclosurevars(fn).nonlocals["infer_params"]
    told = inspect.getclosurevars(infer_params).nonlocals
    static, donated = told["static_broadcasted_tuple"], told["donate_tuple"]
    return PmapOptions(tuple(static), bool(donated))


def donated_operands(call: Any) -> list[Any]:
    """The operands that a jit equation donates, which JAX leaves undone."""
    donated = call.params.get("donated_invars", (False,) * len(call.invars))
    pairs = zip(call.invars, donated, strict=True)
    return [x for x, is_donated in pairs if is_donated]
