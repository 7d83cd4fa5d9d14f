"""Where `config.json` says something: of the model, or of a multimodal one's text."""

from collections.abc import Iterator, Mapping
from typing import Any


def tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config itself, and its `text_config` if it has one."""
    yield config
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        yield nested
