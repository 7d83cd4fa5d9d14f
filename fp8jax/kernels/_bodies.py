"""Whether kernels' bodies are traced, or types of results alone are asked for.

A program's trace asks each kernel for its types, and the passes after it drop half of
the kernels again. A body is Python that takes ten times as long to trace as its call.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_LEFT_OUT = contextvars.ContextVar("fp8jax_bodies_left_out", default=False)


def are_left_out() -> bool:
    """Whether a kernel that is called now need only give results of its types."""
    return _LEFT_OUT.get()


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Kernels called in here give results of their types, whatever the numbers."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)
