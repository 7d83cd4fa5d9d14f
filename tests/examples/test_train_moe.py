"""`examples/train_moe.py` as a person runs it, in a small setting."""

import csv
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "train_moe.py"
STEPS, BATCH, SEQ_LEN, EXPERTS, TOP_K = 8, 4, 32, 4, 2
SMALL = (
    f"--steps={STEPS}",
    f"--batch={BATCH}",
    f"--seq_len={SEQ_LEN}",
    f"--experts={EXPERTS}",
    f"--top_k={TOP_K}",
    "--groups=2",
    "--d_ff=128",
    "--learning_rate=0.001",
)


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """What one run wrote and printed."""
    corpus, out = (tmp_path_factory.mktemp(name) for name in ("corpus", "out"))
    for i in range(100):
        (corpus / f"m{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n\n" * 5)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *SMALL, f"--corpus={corpus}", f"--out={out}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment | {"PYTHONPATH": str(PROGRAM.parents[1]), "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_report_has_every_kind_of_layer_and_leaves_out_what_it_should(outcome):
    lines = [line.split() for line in outcome[1].splitlines()]
    rows = [line for line in lines if len(line) > 7 and "/" in line[0]]

    def told(path, role):
        """What rows say whose path, long ones cut in the middle, may be this one."""
        found = set()
        for shown, its_role, *columns in rows:
            start, _, end = shown.partition("...")
            if its_role == role and path.startswith(start) and path.endswith(end):
                found.add(columns[5])
        return found

    for role in ("fprop", "dgrad", "wgrad"):
        for layer in (
            "blocks/1/mlp/experts/gate",
            "blocks/1/mlp/experts/down",
            "blocks/1/mlp/shared/up",
            "blocks/0/mlp/down",
            "blocks/0/attention/q_b",
            "mtp_block/attention/kv_a",
            "mtp_block/mlp/experts/up",
        ):
            assert told(f"{layer}/kernel", role) == {"fp8"}
        for layer in ("blocks/1/mlp/router", "head"):
            assert told(f"{layer}/kernel", role) == {"skipped"}


def test_losses_fall_alike_in_both_arms(outcome):
    rows = read_csv(outcome[0] / "loss.csv")
    assert list(rows[0]) == ["step", "tokens", "loss_bf16", "loss_fp8"]
    assert int(rows[-1]["tokens"]) == STEPS * BATCH * SEQ_LEN
    bf16, fp8 = (
        np.array([float(row[f"loss_{arm}"]) for row in rows]) for arm in ("bf16", "fp8")
    )
    for losses in (bf16, fp8):
        # No bounds but margins: measured are 0.2 %, a fall to 0.77, and 0.2 % between
        # arms.
        assert losses[0] == pytest.approx(math.log(256), rel=0.02)
        assert losses[-1] < 0.9 * losses[0]
    assert np.any(bf16 != fp8)
    np.testing.assert_allclose(fp8, bf16, rtol=3e-2)
    assert [row["arm"] for row in read_csv(outcome[0] / "summary.csv")] == [
        "bf16",
        "fp8",
    ]


def test_loads_are_shares_of_every_mixture(outcome):
    rows = read_csv(outcome[0] / "load.csv")
    shares = np.array([float(row["share"]) for row in rows]).reshape(2, 2, EXPERTS)
    # Four shares, written with five digits.
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-4)
    # No expert has a token twice.
    assert np.all(shares <= 1 / TOP_K + 1e-5)
    mixtures = {row["mixture"] for row in rows}
    assert mixtures == {"layer 1", "multi-token prediction"}
    for name in ("loss.png", "load.png"):
        assert (outcome[0] / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def program():
    """The example as a module; its flags leave absl's registry with it."""
    sys.path.insert(0, str(PROGRAM.parent))  # As for a program that is run.
    spec = importlib.util.spec_from_file_location("train_moe", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_moe"] = module  # Where dataclasses look their module up.
    before = set(flags.FLAGS)
    spec.loader.exec_module(module)
    own = set(flags.FLAGS) - before
    yield module
    for name in own:
        delattr(flags.FLAGS, name)
    del sys.modules["train_moe"]
    sys.path.remove(str(PROGRAM.parent))


def test_unusable_sizes_are_one_line_and_exit_code_2(program, tmp_path, capsys):
    for argv, message in (
        (["--layers=1"], "--layers must be at least 2"),
        (["--rope_dim=33"], "--rope_dim must be even, got 33"),
        (["--experts=6"], "--experts must be a multiple of --groups"),
        (["--top_k=5"], "got 8, 4, 2 and 5"),
    ):
        for name in program.byte_lm.flags.FLAGS:
            if name in ("layers", "rope_dim", "experts", "top_k"):
                flags.FLAGS[name].unparse()
        program.parse_flags(["train_moe", f"--out={tmp_path}", *argv])
        with pytest.raises(SystemExit) as stop:
            program.main([])
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("train_moe: ")
        assert message in printed
        assert printed.count("\n") == 1


def test_busiest_expert_is_compared_with_the_mean(program):
    load = np.array([[1, 1, 1, 1], [0, 0, 8, 0]])
    np.testing.assert_array_equal(program.imbalance(load), [1, 4])
