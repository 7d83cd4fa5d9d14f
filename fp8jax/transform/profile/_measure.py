"""Runs a compiled step under JAX's profiler."""

import pathlib
import tempfile
from typing import Any

import jax

from fp8jax.transform.plan import Report
from fp8jax.transform.profile._events import Event, events_of
from fp8jax.transform.profile._origins import origins
from fp8jax.transform.profile._profile import Profile, profile_of

# With CUDA graphs a profiler sees kernels and not which operations launched them.
_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
_WARM, _STEPS = 2, 3


def check_measurable(name: str, args: Any, kwargs: Any) -> None:
    """Refuses what `measured` cannot measure.

    Args:
        name: of the step, for messages.
        args, kwargs: what it would be called with.

    Raises:
        RuntimeError: Where no GPU is.
        ValueError: For arguments that stand for arrays.
    """
    if not _is_on_gpu():
        raise RuntimeError(
            f"fp8_transform({name}).profile measures kernels on a GPU, got the backend "
            f"{jax.default_backend()!r}. .report(*args) runs anywhere."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"fp8_transform({name}).profile runs the step: it takes arrays, got "
                f"{leaf} as argument{jax.tree_util.keystr(path[1:])}."
            )


def measured(
    lowered: jax.stages.Lowered,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    report: Report,
    name: str,
) -> Profile:
    """Compiles a step once more, and runs it.

    Args:
        lowered: the step, its products `tagged` by the report's rows.
        args, kwargs: what the compiled step is called with. What it donates is copied
            for each run: these arrays stay.
        report: of the same step.
        name: of the step, for messages.

    Raises:
        RuntimeError: If the profiler saw no kernel.
    """
    compiled = lowered.compile(compiler_options=_OPTIONS)
    hlo = compiled.as_text()
    assert hlo is not None, "XLA:GPU gives its programs' text"
    known = origins(hlo)
    donated = jax.tree.map(lambda info: info.donated, lowered.args_info)

    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        copies = jax.tree.map(
            lambda gone, x: x.copy() if gone and isinstance(x, jax.Array) else x,
            donated,
            (args, kwargs),
        )
        return jax.block_until_ready(copies)

    for _ in range(_WARM):
        _run(compiled, *arguments())
    steps = []
    for _ in range(_STEPS):
        copies = arguments()
        with tempfile.TemporaryDirectory(prefix="fp8jax-profile-") as folder:
            # Nothing but the step runs meanwhile: all that is seen is of it.
            with jax.profiler.trace(folder, profiler_options=_profiler_options()):
                _run(compiled, *copies)
            steps.append(_events(folder))
    if not any(steps):
        raise RuntimeError(
            f"fp8_transform({name}).profile: JAX's profiler saw no kernel on a GPU."
        )
    kind = jax.local_devices()[0].device_kind
    return profile_of(steps, known, report, kind, jax.process_count())


def _is_on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _run(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    jax.block_until_ready(compiled(*args, **kwargs))


def _profiler_options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls are many, and nobody looks.
    return options


def _events(folder: str) -> list[Event]:
    """The events of all hosts' files that a trace wrote, which is this host's one."""
    found = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        data = jax.profiler.ProfileData.from_file(str(path))
        found += events_of(data.planes)
    return found
