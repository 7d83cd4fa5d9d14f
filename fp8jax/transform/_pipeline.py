"""The passes over a program, in the order in which they run.

Whole steps, forward functions and the halves of `custom_rules` take the same way.
Between `sink` and `replace` the program is analysed and its plan is made: positions in
the plan count the equations that `sink` leaves. To add a pass, write a file in `passes`
with a function of a `Program` to another, and its line here.
"""

from collections.abc import Callable, Collection, Iterable

from fp8jax.transform.lower import Program
from fp8jax.transform.passes._carry import carry
from fp8jax.transform.passes._clean import clean
from fp8jax.transform.passes._collect import collect
from fp8jax.transform.passes._dedupe import dedupe
from fp8jax.transform.passes._fuse import fuse
from fp8jax.transform.passes._hoist import hoist
from fp8jax.transform.passes._inline import inline
from fp8jax.transform.passes._pair import pair
from fp8jax.transform.passes._replace import replace
from fp8jax.transform.passes._sink import sink
from fp8jax.transform.passes._unblock import unblock

PASSES: dict[str, Callable[[Program], Program]] = {
    # Nested jitted functions that hold products are written out where they are called.
    "inline": inline,
    # Codes of weights stored in FP8 go into bodies, to the products that read them.
    "sink": sink,
    # Products become quantizations and products of codes, or calls with a gradient.
    "replace": replace,
    # With `residual="fp8"`, a forward scan stacks codes where it stacked activations.
    "carry": carry,
    # Quantizations of what a loop or a remat body does not change leave it.
    "hoist": hoist,
    # Equal quantizations are made once, and those of one matrix two ways in one call.
    "pair": pair,
    # What is computed elementwise only to be quantized is computed by the quantization.
    "fuse": fuse,
    # Backward scans read slices of what the forward pass stacked where they lie.
    "unblock": unblock,
    # What a scan or a call was given twice, it is given once.
    "dedupe": dedupe,
    # What products' quantizations cost, with `stats=`, comes out of nested jaxprs.
    "collect": collect,
    # What nothing reads any more goes.
    "clean": clean,
}
_NAMES = [*PASSES]
_BEFORE_THE_PLAN = _NAMES.index("replace")
_NEEDED = ("replace", "collect")
# With or without one of these, the numbers are the same, bit for bit: they say where
# codes are made, and how often.
SAME_NUMBERS = ("inline", "carry", "hoist", "pair", "dedupe", "clean")
OPTIONAL = tuple(name for name in PASSES if name not in _NEEDED)


def check_without(without: str | Iterable[str]) -> frozenset[str]:
    """`without` as names of passes.

    Raises:
        ValueError: If it is none.
    """
    names = (without,) if isinstance(without, str) else without
    if not isinstance(names, Iterable) or any(x not in OPTIONAL for x in names):
        raise ValueError(
            f"fp8_transform takes without=() or names of passes among "
            f"{', '.join(OPTIONAL)}, got {without!r}."
        )
    return frozenset(names)


def prepared(program: Program, without: Collection[str] = ()) -> Program:
    """The program that is analysed: after the passes that come before the plan."""
    return _run(program, _NAMES[:_BEFORE_THE_PLAN], without)


def lowered(program: Program, without: Collection[str] = ()) -> Program:
    """The program in FP8: a prepared one, and its plan, after all other passes."""
    return _run(program, _NAMES[_BEFORE_THE_PLAN:], without)


def _run(program: Program, names: Iterable[str], without: Collection[str]) -> Program:
    for name in names:
        if name not in without:
            program = PASSES[name](program)
    return program
