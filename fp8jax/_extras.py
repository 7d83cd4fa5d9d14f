"""What misses a package that is no requirement names the extra that brings it."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Imports inside that find no package say what brings it.

    Args:
        what: the name of ours that imports.
        extra: the extra of ours whose packages it takes.

    Raises:
        ModuleNotFoundError: In place of Python's own, with the same `name`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fp8jax":
            raise
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is missing here: pip install "
            f"'fp8jax[{extra}]'.",
            name=error.name,
        ) from error
