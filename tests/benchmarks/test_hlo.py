"""Compiled programs are read right: on small ones, counted by hand."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import _hlo

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n"
GEMM = (
    "%{name} = bf16[256,128]{{1,0}} custom-call(%{x}, %{s}, %{w}, %{s}), "
    'custom_call_target="mosaic_gpu_v2", metadata={{op_name="{source}" id={name}}}, '
    'backend_config={{module = "){kernel}\\22"}}'
)


def gemm(name, x="codes", s="scale", w="w", source="jit(step)/fprop", kernel="k"):
    return GEMM.format(name=name, x=x, s=s, w=w, source=source, kernel=kernel)


def program(entry, *computations, header=HEADER):
    """A program of an entry's lines and whole computations."""
    body = "\n".join(f"  {line}" for line in entry)
    return _hlo.parse(
        "\n\n".join(
            (header, *computations, f"ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}")
        )
    )


def computation(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[]) -> f32[] {{\n{body}\n}}"


def loop(body, trips, name="while.1"):
    known = (
        f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    )
    return (
        f"%{name} = (s32[], f32[2]{{0}}) while(%init), condition=%until, body=%{body}"
        f"{known}"
    )


CODES = (
    "%codes = f8e4m3fn[256,128]{1,0} parameter(0)",
    "%scale = f32[1,256]{1,0} parameter(1)",
    "%w = f8e4m3fn[128,128]{1,0} parameter(2)",
)
UNTIL = computation("until", "ROOT %yes = pred[] parameter(0)")


@pytest.mark.parametrize(
    ("array", "nbytes"),
    [
        (_hlo.Array("f8e4m3fn", (3, 5)), 15),
        (_hlo.Array("bf16", (3, 5)), 30),
        (_hlo.Array("f32", ()), 4),
        (_hlo.Array("pred", (7,)), 7),
        (_hlo.Array("s4", (3,)), 2),
        (_hlo.Array("f4e2m1fn", (4,)), 2),
        (_hlo.Array("c64", (2,)), 16),
        (_hlo.Array("token", ()), 0),
    ],
)
def test_bytes_of_each_type(array, nbytes):
    assert array.nbytes == nbytes


def test_nested_loops_multiply_what_runs_in_them():
    inner = computation("inner", *CODES, "ROOT " + gemm("g"))
    fused = computation("fused", *CODES, "ROOT " + gemm("f"))
    outer = computation(
        "outer",
        *CODES,
        loop("inner", 5, "while.2"),
        "ROOT %fusion = bf16[256,128]{1,0} fusion(%codes, %scale, %w), kind=kCustom, "
        "calls=%fused",
    )
    found = program(
        [*CODES, loop("outer", 3), gemm("once")], UNTIL, inner, fused, outer
    )
    kernels = _hlo.kernels(found)
    assert {k.name: k.times for k in kernels} == {"g": 15, "f": 3, "once": 1}
    assert all(k.is_product and not k.is_quantization for k in kernels)
    assert kernels[0].operands[0] == _hlo.Array("f8e4m3fn", (256, 128))
    assert kernels[0].results == (_hlo.Array("bf16", (256, 128)),)


def test_loop_of_unknown_length_is_refused_by_name():
    body = computation("body", "ROOT %p = f32[] parameter(0)")
    found = program([loop("body", None)], UNTIL, body)
    with pytest.raises(ValueError, match=r"while.1 has no known_trip_count"):
        list(_hlo.runs(found))


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        _hlo.parse("module @jit_f {}")


def test_quantization_is_told_from_product():
    call = (
        "%q = (f8e4m3fn[256,128]{1,0}, f32[1,256]{1,0}) custom-call(%x), "
        'custom_call_target="mosaic_gpu_v2"'
    )
    (kernel,) = _hlo.kernels(program(["%x = bf16[256,128]{1,0} parameter(0)", call]))
    assert kernel.is_quantization
    assert not kernel.is_product
    assert [a.dtype for a in kernel.results] == ["f8e4m3fn", "f32"]


RING = {  # Result of 1024 float32, groups of 4: bytes that one device sends.
    "all-gather": 4096 * 3 / 4,
    "all-reduce": 4096 * 2 * 3 / 4,
    "reduce-scatter": 4096 * 3,
    "all-to-all": 4096 * 3 / 4,
}
GROUPS = {
    "list": "{{0,1,2,3},{4,5,6,7}}",
    "iota": "[2,4]<=[8]",
    "transposed iota": "[2,4]<=[4,2]T(1,0)",
    "axis": "mesh['x'=2,'y'=4] {'y'}",
    "two axes": "mesh['x'=2,'y'=2,'z'=2] {'x','z'}",
    "part of an axis": "mesh['x'=8] {'x':(2)4}",
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("opcode", RING)
def test_bytes_sent_on_a_ring(opcode, groups):
    line = f"%c = f32[1024]{{0}} {opcode}(%p), channel_id=1, replica_groups={groups}"
    (found,) = _hlo.collectives(program(["%p = f32[1]{0} parameter(0)", line]))
    assert (found.opcode, found.devices, found.sent) == (opcode, 4, RING[opcode])
    assert found.between is None


@pytest.mark.parametrize("groups", ["replica_groups={}", "use_global_device_ids=true"])
def test_collective_without_groups_is_over_all_devices(groups):
    line = f"%c = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add"
    (found,) = _hlo.collectives(program(["%p = f32[8]{0} parameter(0)", line]))
    assert found.devices == 8


def test_permutation_sends_its_operand_once():
    line = "%c = u8[64]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}"
    (found,) = _hlo.collectives(program(["%p = u8[64]{0} parameter(0)", line]))
    assert found.sent == 64


def test_arrays_of_a_combined_collective_are_its_results_alone():
    entry = [
        "%a = bf16[128,8]{1,0} parameter(0)",
        "%b = f8e4m3fn[16,4]{1,0} parameter(1)",
        "%s = ((bf16[128,8]{1,0}, f8e4m3fn[16,4]{1,0}), (bf16[1024,8]{1,0}, "
        "/*index=1*/f8e4m3fn[128,4]{1,0})) all-gather-start(%a, %b), "
        "replica_groups=mesh['x'=8] {'x'}, dimensions={0}",
        "%d = (bf16[1024,8]{1,0}, f8e4m3fn[128,4]{1,0}) all-gather-done(%s)",
    ]
    (found,) = _hlo.collectives(program(entry))
    assert found.nbytes == 1024 * 8 * 2 + 128 * 4
    assert _hlo.gathered([found]) == {1024 * 8: 1, 128 * 4: 1}
    assert _hlo.gathered([found], at_least=1000) == {1024 * 8: 1}
    assert _hlo.sent([found, found]) == 2 * found.nbytes * 7 / 8


def test_collective_in_a_loop_counts_its_trips():
    body = computation(
        "body", "ROOT %c = f32[16]{0} all-reduce(%p), replica_groups=[1,8]<=[8]"
    )
    (found,) = _hlo.collectives(program([loop("body", 6)], UNTIL, body))
    assert (found.times, found.nbytes) == (6, 6 * 64)


def test_what_runs_between_start_and_done():
    inner = computation("inner", *CODES, "ROOT " + gemm("g"))
    entry = [
        *CODES,
        gemm("before"),
        "%s = (f32[8]{0}, f32[8]{0}) all-reduce-start(%p), replica_groups={}",
        "%other = (f32[8]{0}, f32[8]{0}) all-reduce-start(%q), replica_groups={}",
        gemm("during"),
        "%e = bf16[256,128]{1,0} get-tuple-element(%during), index=0",
        loop("inner", 4),
        "%cs = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)",
        "%cd = f32[8]{0} copy-done(%cs)",
        "%done = f32[8]{0} all-reduce-done(%s)",
        gemm("after"),
        "%end = f32[8]{0} all-reduce-done(%other)",
    ]
    first, second = _hlo.collectives(program(entry, UNTIL, inner))
    assert [i.name for i in first.between] == ["during", "while.1", "cs"]
    assert (first.kernels, second.kernels) == (5, 6)


def test_collective_in_an_asynchronous_call():
    wrapped = computation(
        "wrapped",
        "%p = f8e4m3fn[16]{0} parameter(0)",
        "ROOT %c = f8e4m3fn[16]{0} all-to-all(%p), replica_groups={{0,1}}",
    )
    entry = [
        *CODES,
        "%s = ((f8e4m3fn[16]{0}), f8e4m3fn[16]{0}) async-start(%p), calls=%wrapped",
        gemm("during"),
        "%u = ((f8e4m3fn[16]{0}), f8e4m3fn[16]{0}) async-update(%s)",
        "%d = f8e4m3fn[16]{0} async-done(%u)",
    ]
    (found,) = _hlo.collectives(program(entry, wrapped))
    assert (found.opcode, found.devices, found.sent) == ("all-to-all", 2, 8)
    assert found.kernels == 1


def test_collectives_of_a_program_without_schedule_are_refused():
    with pytest.raises(ValueError, match="scheduled"):
        _hlo.collectives(program(["%p = f32[] parameter(0)"], header="HloModule m"))


def test_collective_without_an_end_is_refused():
    entry = ["%s = (f32[8]{0}, f32[8]{0}) all-reduce-start(%p), replica_groups={}"]
    with pytest.raises(ValueError, match="no end of s in main"):
        _hlo.collectives(program(entry))


SLICE = (
    "f8e4m3fn[1,128,128]{2,1,0} dynamic-slice(%stack, %i, %z, %z), "
    "dynamic_slice_sizes={1,128,128}"
)
STACK = (
    "%codes = f8e4m3fn[256,128]{1,0} parameter(0)",
    "%scale = f32[1,256]{1,0} parameter(1)",
    "%stack = f8e4m3fn[3,128,128]{2,1,0} parameter(2)",
    "%i = s32[] parameter(3)",
)
FUSED = computation(
    "dynamic-slice-fusion",
    *STACK,
    "%results = bf16[3,256,128]{2,1,0} parameter(4)",
    "%z = s32[] constant(0)",
    f'%slice.7 = {SLICE}, metadata={{op_name="slice" id=7}}',
    "%w.7 = f8e4m3fn[128,128]{1,0} bitcast(%slice.7)",
    gemm("twin", w="w.7"),
    "ROOT %u = bf16[3,256,128]{2,1,0} dynamic-update-slice(%results, %twin, %i, %z)",
)
SLICED = computation(
    "sliced",
    "%stack = f8e4m3fn[3,128,128]{2,1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%z = s32[] constant(0)",
    f"ROOT %slice.8 = {SLICE}",
)


def calls_beside_a_stack(*calls):
    """A kernel in a stack's fusion, and `calls` that read `mine` or `other`."""
    return program(
        [
            *STACK,
            "%other = f8e4m3fn[128,128]{1,0} parameter(4)",
            "%results = bf16[3,256,128]{2,1,0} parameter(5)",
            "%s = ((f8e4m3fn[3,128,128]{2,1,0}), f8e4m3fn[1,128,128]{2,1,0}) "
            "fusion-start(%stack, %i), kind=kLoop, calls=%sliced",
            "%d = f8e4m3fn[1,128,128]{2,1,0} fusion-done(%s)",
            "%mine = f8e4m3fn[128,128]{1,0} bitcast(%d)",
            "%f = bf16[3,256,128]{2,1,0} fusion(%codes, %scale, %stack, %i, "
            "/*index=4*/%results), kind=kCustom, calls=%dynamic-slice-fusion",
            *calls,
        ],
        FUSED,
        SLICED,
    )


def test_call_doubled_into_a_stack_is_a_clone():
    found = calls_beside_a_stack(gemm("call", w="mine"))
    assert [set(names) for names in _hlo.clones(found)] == [{"twin", "call"}]


@pytest.mark.parametrize(
    "different",
    [
        {"w": "other"},
        {"w": "mine", "kernel": "another"},
        {"w": "mine", "source": "jit(step)/rematted_computation/fprop"},
    ],
)
def test_call_of_other_weight_kernel_or_recomputation_is_no_clone(different):
    assert _hlo.clones(calls_beside_a_stack(gemm("call", **different))) == []


def test_calls_in_two_loops_are_no_clones():
    bodies = [computation(n, *CODES, "ROOT " + gemm(f"g{n}")) for n in ("a", "b")]
    entry = [loop("a", 2), loop("b", 2, "while.2")]
    assert _hlo.clones(program(entry, UNTIL, *bodies)) == []


def test_reductions_by_different_operators_are_different_values():
    reducers = [
        computation(op, f"ROOT %{op}.1 = f32[] {op}(%a, %b)")
        for op in ("add", "maximum")
    ]

    def reduced(op, name):
        return f"%{name} = f32[1,256]{{1,0}} reduce(%scale, %z), to_apply=%{op}"

    def clones(*operators):
        entry = [*CODES, "%z = f32[] constant(0)"]
        for i, op in enumerate(operators):
            entry += [reduced(op, f"r{i}"), gemm(f"g{i}", s=f"r{i}")]
        return _hlo.clones(program(entry, *reducers))

    assert clones("add", "add") == [("g0", "g1")]
    assert clones("add", "maximum") == []


def test_work_of_xla_on_codes_is_found_and_kernels_and_moves_are_none():
    fused = computation(
        "fused",
        *CODES[:1],
        "ROOT %wide = f32[256,128]{1,0} convert(%codes)",
    )
    entry = [
        *CODES,
        gemm("kernel"),
        "%moved = f8e4m3fn[128,256]{1,0} transpose(%codes), dimensions={1,0}",
        "%f = f32[256,128]{1,0} fusion(%codes), kind=kLoop, calls=%fused",
        "%dot = f32[256,128]{1,0} dot(%codes, %w), lhs_contracting_dims={1}",
        "%made = f8e4m3fn[1,256]{1,0} convert(%scale)",
        '%lt = f32[256,128]{1,0} custom-call(%codes, %w), custom_call_target="cublas"',
        "%plain = bf16[1,256]{1,0} convert(%scale)",
    ]
    names = [run.instruction.name for run in _hlo.emulated(program(entry, fused))]
    assert names == ["wide", "dot", "made", "lt"]


WEIGHT = "%weight = f32[3,64,32]{2,1,0} parameter(0)"


def test_copies_of_weights_are_found_in_any_shape_and_fills_are_none():
    entry = [
        WEIGHT,
        "%vector = f32[64]{0} parameter(1)",
        "%updated = f32[3,64,32]{2,1,0} add(%weight, %weight)",
        "%copy.1 = f32[3,64,32]{2,1,0} copy(%updated)",
        "%flat = f32[6144]{0} bitcast(%updated)",
        "%copy.2 = f32[6144]{0} copy(%flat)",
        "%start = (f32[6144]{0}, f32[6144]{0}, u32[]) copy-start(%flat)",
        "%done = f32[6144]{0} copy-done(%start)",
        "%zero = f32[] constant(0)",
        "%zeros = f32[3,64,32]{2,1,0} broadcast(%zero), dimensions={}",
        "%fill = f32[3,64,32]{2,1,0} copy(%zeros)",
        "%codes = bf16[3,64,32]{2,1,0} convert(%weight)",
        "%half = bf16[3,64,32]{2,1,0} copy(%codes)",
        "%small = f32[64]{0} copy(%vector)",
    ]
    names = [run.instruction.name for run in _hlo.copied_weights(program(entry))]
    assert names == ["copy.1", "copy.2", "start"]


def test_update_that_transposes_counts_once():
    fused = computation(
        "fused_transpose",
        "%g = f32[64,3,32]{2,1,0} parameter(0)",
        "%t.1 = f32[3,64,32]{2,1,0} transpose(%g), dimensions={1,0,2}",
        "%t.2 = f32[3,64,32]{2,1,0} transpose(%g), dimensions={1,0,2}",
        "ROOT %t = (f32[3,64,32]{2,1,0}, f32[3,64,32]{2,1,0}) tuple(%t.1, %t.2)",
    )
    entry = [
        WEIGHT,
        "%u = (f32[3,64,32]{2,1,0}, f32[3,64,32]{2,1,0}) fusion(%weight), kind=kInput, "
        "calls=%fused_transpose",
        "%alone = bf16[32,192]{1,0} transpose(%b), dimensions={1,0}",
        "%activation = bf16[64,32]{1,0} transpose(%b), dimensions={1,0}",
    ]
    found = _hlo.transposed_weights(program(entry, fused))
    assert [run.launch.name for run in found] == ["u", "alone"]


def test_collectives_of_a_real_program():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))

    def f(x):
        def body(_, y):
            total = jnp.sum(jnp.sin(y), axis=0)
            return y + jax.lax.with_sharding_constraint(total, whole)

        return jax.lax.fori_loop(0, 3, body, x)

    x = jax.device_put(np.ones((64, 96), np.float32), rows)
    text = jax.jit(f, out_shardings=rows).lower(x).compile().as_text()
    found = _hlo.collectives(_hlo.parse(text))
    sums = collections.Counter(
        {c.opcode: c.nbytes for c in found if c.opcode == "all-reduce"}
    )
    assert sums == {"all-reduce": 3 * 96 * 4}
    assert {c.devices for c in found} == {8}
