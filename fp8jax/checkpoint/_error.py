"""The one error of files that cannot be trusted."""

import os


class CheckpointError(ValueError):
    """A checkpoint that is not what it says; the message names file and tensor."""

    def __init__(self, path: str | os.PathLike, reason: str, tensor: str | None = None):
        where = f"{os.fspath(path)}: " + (f"tensor {tensor!r}: " if tensor else "")
        super().__init__(where + reason)
        self.path = os.fspath(path)
        self.tensor = tensor
