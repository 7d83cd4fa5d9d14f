"""Names the extra that brings an optional package where the package is missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Makes failing imports in its body say which extra to install.

    Args:
        what: the part of fp8jax that needs the imports, for the message.
        extra: the extra of fp8jax that brings the packages.

    Raises:
        ModuleNotFoundError: Instead of Python's own error, with the same `name`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fp8jax":
            raise
        package = error.name.partition(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is missing here: pip install "
            f"'fp8jax[{extra}]'.",
            name=error.name,
        ) from error
