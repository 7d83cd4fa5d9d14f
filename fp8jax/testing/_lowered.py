"""Whether a compiled program is in FP8, by its optimized HLO."""

import re

import jax

_FP8_ARRAY = re.compile(r"\bf8e(?:4m3|5m2)\w*\[")
# "%name = type opcode(operands), attributes"
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%?[\w.-]+) = (.*)")
_KERNEL = re.compile(r'custom_call_target="mosaic_gpu')


def assert_fp8_lowered(compiled: jax.stages.Compiled | jax.stages.Lowered) -> None:
    """A compiled program computes in FP8: `jax.jit(step).lower(*args).compile()`.

    On a GPU: its optimized HLO calls Mosaic kernels that read FP8 arrays, as this
    library's GEMMs there do. Elsewhere, where products of FP8 codes are computed in
    wider types: there are FP8 arrays in it.

    Args:
        compiled: what `.lower(*args).compile()` gives, or what `.lower(*args)` gives,
            which is compiled then.

    Raises:
        ValueError: If `compiled` is neither.
        AssertionError: If it is not in FP8; it says what was found instead.
    """
    if isinstance(compiled, jax.stages.Lowered):
        compiled = compiled.compile()
    if not isinstance(compiled, jax.stages.Compiled):
        raise ValueError(
            "assert_fp8_lowered takes a jax.stages.Compiled or Lowered, as "
            f"jax.jit(f).lower(*args) gives, got {type(compiled)}."
        )
    text = compiled.as_text()
    if text is None:
        raise ValueError("assert_fp8_lowered got a program without HLO text.")
    obstacle = _obstacle(text, _platform(compiled))
    if obstacle:
        raise AssertionError(f"assert_fp8_lowered: {obstacle}")


def _platform(compiled: jax.stages.Compiled) -> str:
    shardings = compiled.input_shardings, compiled.output_shardings
    for sharding in jax.tree.leaves(shardings):
        return next(iter(sharding.device_set)).platform
    return jax.default_backend()


def _obstacle(text: str, platform: str) -> str:
    """What is missing in the HLO of a program in FP8, or `""`."""
    arrays = len(_FP8_ARRAY.findall(text))
    products = len(re.findall(r" (?:dot|convolution)\(", text))
    if not arrays:
        return (
            f"no FP8 array in the program for {platform}, but {products} plain "
            "products (dot, convolution); fp8_transform(...).report(*args) says why."
        )
    if platform != "gpu":
        return ""
    kernels, reading_fp8 = _mosaic_kernels(text)
    if reading_fp8:
        return ""
    targets = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
    return (
        f"FP8 arrays are in the program, but none of its {kernels} Mosaic kernels "
        "reads any: products run elsewhere. Its custom calls: "
        f"{', '.join(targets) or 'none'}."
    )


def _mosaic_kernels(text: str) -> tuple[int, int]:
    """How many Mosaic kernels are called, and how many of them with FP8 operands."""
    fp8, calls = set(), []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        if _FP8_ARRAY.match(rest):
            fp8.add(name.lstrip("%"))
        if _KERNEL.search(rest):
            # XLA may print an operand with its type or without.
            calls.append(rest.partition("custom-call(")[2].partition(")")[0])
    reading = [
        operands
        for operands in calls
        if _FP8_ARRAY.search(operands)
        or any(name in fp8 for name in re.findall(r"[\w.-]+", operands))
    ]
    return len(calls), len(reading)
