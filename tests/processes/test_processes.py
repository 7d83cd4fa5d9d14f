"""Two processes of `jax.distributed` train as one process with as many devices does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytest.importorskip("orbax.checkpoint")
PROGRAM = pathlib.Path(__file__).parent / "train.py"
ROOT = PROGRAM.parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(folder, processes, devices):
    """What each process found, of `devices` each."""
    args = [str(v) for v in (processes, devices, free_port(), folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    children = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), *args],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-2000:]
    files = [pathlib.Path(f"{folder}.{rank}.json") for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def losses(found):
    return [float.fromhex(loss) for loss in found["losses"]]


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_train_as_one_and_resume(tmp_path, devices):
    (of_one,) = run(tmp_path / "one", 1, 2 * devices)
    of_two = run(tmp_path / "two", 2, devices)
    assert of_two[0] == of_two[1]
    one, two = of_one["fp8"], [found["fp8"] for found in of_two]
    for found in (one, *two):
        assert found["fraction"] == 1.0
        assert found["restored"]
        assert found["resumed"][0] == found["resumed"][1]
        assert found["sharding"] == one["sharding"]
    plain_one, plain_two = of_one["plain"], of_two[0]["plain"]
    # Two values are added in one order; gloo adds four in another than one process.
    if plain_one["digests"] == plain_two["digests"]:
        assert two[0]["digests"] == one["digests"]
    else:
        # See tests/transform/test_sharding.py of what another order of sums can do to a
        # gradient: here to the loss, by its decrease, over all steps.
        fell = losses(one)[0] - losses(one)[-1]
        for a, b in zip(losses(two[0]), losses(one), strict=True):
            assert abs(a - b) <= 2**-7.5 * fell
    if devices == 1:
        assert plain_one["digests"] == plain_two["digests"]
