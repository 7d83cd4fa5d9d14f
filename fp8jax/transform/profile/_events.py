"""What a profiler saw on the GPUs: kernels and copies with their times.

`jax.profiler.ProfileData` has planes (a device each), of lines (a stream each), of
events. Of an event's statistics `hlo_op` names the operation of the compiled program.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

_DEVICE = "/device:GPU:"
_STREAM = "Stream #"


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy.

    Attributes:
        device: the plane's name.
        name: of the kernel; `Memcpy...` and `Memset...` of what is none.
        op: the operation of the compiled program, `""` if it is not known.
        start_ns, duration_ns: nanoseconds.
    """

    device: str
    name: str
    op: str
    start_ns: float
    duration_ns: float

    @property
    def end_ns(self) -> float:
        return self.start_ns + self.duration_ns


def events_of(planes: Iterable[Any]) -> list[Event]:
    """All that GPUs did, by start.

    Args:
        planes: of a `jax.profiler.ProfileData`.
    """
    found = []
    with warnings.catch_warnings():
        # JAX 0.12 warns of its own type of statistics, and aborts if that is an error.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in planes:
            if not plane.name.startswith(_DEVICE):
                continue
            for line in plane.lines:
                if line.name.startswith(_STREAM):  # Others sum streams up.
                    found += [_event(plane.name, event) for event in line.events]
    return sorted(found, key=lambda event: event.start_ns)


def _event(device: str, seen: Any) -> Event:
    op = str(dict(seen.stats).get("hlo_op", ""))
    return Event(device, seen.name, op, seen.start_ns, seen.duration_ns)


def busy_ns(events: Iterable[Event]) -> float:
    """How long one device had anything to do, events in order of their start."""
    busy, end = 0.0, float("-inf")
    for event in events:
        busy += max(0.0, event.end_ns - max(event.start_ns, end))
        end = max(end, event.end_ns)
    return busy
