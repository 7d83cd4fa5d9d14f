"""`examples/train_lm.py` as a person runs it, in a small setting."""

import csv
import importlib.util
import math
import os
import pathlib
import subprocess
import sys
import sysconfig

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "train_lm.py"
STEPS, BATCH, SEQ_LEN = 20, 4, 64
SMALL = (
    f"--steps={STEPS}",
    f"--batch={BATCH}",
    f"--seq_len={SEQ_LEN}",
    "--d_model=128",
    "--d_ff=256",
    "--layers=2",
    "--heads=2",
    "--learning_rate=0.002",
)


def run(*argv: str, **more: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | more
    root = str(PROGRAM.parents[1])
    return subprocess.run(
        [sys.executable, str(PROGRAM), *argv],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"PYTHONPATH": root, "COLUMNS": "120"},
    )


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of 200 small sources, of which some are held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(200):
        lines = [f"def f_{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(5)]
        (folder / f"m{i}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def program():
    """The example as a module; its flags leave absl's registry with it."""
    sys.path.insert(0, str(PROGRAM.parent))  # As for a program that is run.
    spec = importlib.util.spec_from_file_location("train_lm", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_lm"] = module  # Where dataclasses look their module up.
    before = set(flags.FLAGS)
    spec.loader.exec_module(module)
    module.own_flags = set(flags.FLAGS) - before
    yield module
    for name in module.own_flags:
        delattr(flags.FLAGS, name)
    del sys.modules["train_lm"]
    sys.path.remove(str(PROGRAM.parent))


@pytest.fixture
def parse(program):
    """Parses flags from their defaults, however often."""

    def parse(*argv: str) -> list[str]:
        for name in program.own_flags:
            flags.FLAGS[name].unparse()
        return program.parse_flags(["train_lm", *argv])

    return parse


@pytest.fixture(scope="module")
def outcome(corpus, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """What one run wrote and printed."""
    out = tmp_path_factory.mktemp("out") / "deep"  # Not there yet.
    done = run(*SMALL, f"--corpus={corpus}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


class TestRun:
    def test_prints_report_and_table(self, outcome):
        _, printed = outcome
        for word in ("fprop", "dgrad", "wgrad", "held-out loss", "tokens/s"):
            assert word in printed
        for layer in ("qkv", "out", "up", "down"):
            assert f"{layer}/kernel" in printed

    def test_loss_csv_has_a_row_a_step_and_both_losses_fall(self, outcome):
        rows = read_csv(outcome[0] / "loss.csv")
        assert list(rows[0]) == ["step", "tokens", "loss_bf16", "loss_fp8"]
        assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
        assert int(rows[-1]["tokens"]) == STEPS * BATCH * SEQ_LEN
        for arm in ("loss_bf16", "loss_fp8"):
            losses = [float(row[arm]) for row in rows]
            # No bounds but margins: measured are 0.2 % and a fall to 0.41.
            # Near uniform at first, well below at the end.
            assert losses[0] == pytest.approx(math.log(256), rel=0.02)
            assert losses[-1] < 0.8 * losses[0]

    def test_arms_start_alike_and_differ_by_what_fp8_costs(self, outcome):
        rows = read_csv(outcome[0] / "loss.csv")
        bf16, fp8 = (
            np.array([float(row[f"loss_{arm}"]) for row in rows])
            for arm in ("bf16", "fp8")
        )
        # Margins again: measured are 0.1 % at first and 0.3 % at last.
        assert abs(fp8[0] / bf16[0] - 1) < 1e-2
        assert np.any(fp8 != bf16)
        assert abs(fp8[-5:].mean() / bf16[-5:].mean() - 1) < 3e-2

    def test_summary_csv_has_an_arm_a_row(self, outcome):
        rows = read_csv(outcome[0] / "summary.csv")
        assert list(rows[0]) == [
            "arm",
            "train_loss",
            "heldout_loss",
            "relative_gap",
            "tokens_per_second",
            "device",
            "jax_version",
            "fp8jax_version",
        ]
        assert [row["arm"] for row in rows] == ["bf16", "fp8"]
        assert float(rows[0]["relative_gap"]) == 0
        gap = float(rows[1]["train_loss"]) / float(rows[0]["train_loss"]) - 1
        assert float(rows[1]["relative_gap"]) == pytest.approx(gap, abs=1e-5)
        for row in rows:
            assert 0 < float(row["heldout_loss"]) < math.log(256)
            assert float(row["tokens_per_second"]) > 0
            assert row["jax_version"] == jax.__version__

    def test_plot_is_a_png(self, outcome):
        assert (outcome[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


class TestParallel:
    @pytest.mark.parametrize("parallel", ["dp", "fsdp"])
    def test_emulated_devices_learn_what_one_learns(
        self, parallel, outcome, corpus, tmp_path
    ):
        # A batch of four is no multiple of eight devices.
        emulated = "--xla_force_host_platform_device_count=4"
        argv = *SMALL, f"--corpus={corpus}", f"--out={tmp_path}"
        done = run(*argv, f"--parallel={parallel}", XLA_FLAGS=emulated)
        assert done.returncode == 0, done.stderr
        assert f"on 4 x cpu, parallel: {parallel}" in done.stdout
        assert "12 of 21 matrix products in FP8" in done.stdout
        ours, alone = read_csv(tmp_path / "loss.csv"), read_csv(outcome[0] / "loss.csv")
        for arm in ("loss_bf16", "loss_fp8"):
            found, wanted = (
                np.array([float(row[arm]) for row in rows]) for rows in (ours, alone)
            )
            # The same weights and batches. Rounded otherwise, as FP8 is to BF16 above.
            assert abs(found[0] / wanted[0] - 1) < 1e-2
            assert abs(found[-5:].mean() / wanted[-5:].mean() - 1) < 3e-2

    def test_without_flags_there_are_eight(self, tmp_path):
        done = run("--parallel=dp", "--batch=4", f"--out={tmp_path}", XLA_FLAGS="")
        assert done.returncode == 2
        assert "multiple of the 8 devices that share it, got 4" in done.stderr

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("parallel", ["none", "dp", "fsdp"])
    def test_fsdp_alone_splits_weights_and_moments(self, program, parallel):
        mesh = program.make_mesh(parallel)
        assert mesh.size == (1 if parallel == "none" else 8)
        config = program.PRESETS["cpu"]
        key = jax.random.key(0)
        state = program.initial_state(config, "xla", parallel, mesh, key)
        split = 8 if parallel == "fsdp" else 1
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            name = str(path[-1])
            parts = split if "kernel" in name or "embedding" in name else 1
            assert x.addressable_shards[0].data.size * parts == x.size


class TestRefusals:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--steps=-5"], "--steps must be positive, got -5"),
            (["--steps=1"], "--steps must be at least 2"),
            (["--steps=many"], "--steps=many"),
            (["--learning_rate=nan"], "--learning_rate must be positive, got nan"),
            (["--layers=0"], "--layers must be positive, got 0"),
            (["--d_model=256", "--heads=3"], "256 and 3"),
            (["--preset=b200"], "--preset=b200: value should be one of <cpu|h200>"),
            (["--recipe=int4"], "--recipe=int4"),
            (["--parallel=tp"], "--parallel=tp"),
            (["--attention=flash"], "--attention=flash"),
            (["--seed=-1"], "--seed=-1"),
            (["--stepz=3"], "stepz"),
            (["train"], "takes flags only, got train"),
            (["--corpus=no/such/folder"], "found 0 under no/such/folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_unusable_value_is_one_line_and_exit_code_2(
        self, program, parse, argv, message, capsys, tmp_path
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(parse(f"--out={tmp_path}", *argv))
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("train_lm: ")
        assert message in printed
        assert printed.count("\n") == 1

    def test_out_that_is_a_file_is_refused(self, program, parse, tmp_path, capsys):
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(SystemExit) as stop:
            program.main(parse(f"--out={file / 'folder'}"))
        assert stop.value.code == 2
        assert "cannot be written: Not a directory" in capsys.readouterr().err

    def test_stdlib_without_sources_is_refused(
        self, program, parse, tmp_path, capsys, monkeypatch
    ):
        # As in a Python that ships compiled modules only.
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(SystemExit) as stop:
            program.main(parse(f"--out={tmp_path}"))
        assert stop.value.code == 2
        assert "bytes of training text in .py files, found 0" in capsys.readouterr().err

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="cudnn may work here")
    def test_attention_that_does_not_run_here_is_refused(
        self, program, parse, corpus, tmp_path, capsys
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(
                parse(f"--out={tmp_path}", f"--corpus={corpus}", "--attention=cudnn")
            )
        assert stop.value.code == 2
        assert "--attention cudnn does not work here" in capsys.readouterr().err

    def test_as_a_process_it_shows_no_traceback(self, tmp_path):
        done = run("--steps=-5", f"--out={tmp_path}")
        assert done.returncode == 2
        assert done.stderr == "train_lm: --steps must be positive, got -5.\n"
        assert not list(tmp_path.iterdir())


class TestText:
    def test_standard_library_is_found_and_split(self, program, parse):
        parse()
        train, heldout = program.byte_lm.load_text("train_lm", None, 128)
        assert train.size > 10e6
        assert 0.02 < heldout.size / (train.size + heldout.size) < 0.1

    def test_copies_of_a_file_lie_on_one_side(self, program, corpus, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for path in corpus.iterdir():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        once, twice = (
            program.byte_lm.read_corpus(corpus),
            program.byte_lm.read_corpus(tmp_path),
        )
        assert [side.size for side in twice] == [2 * side.size for side in once]
        assert all(side.size > 0 for side in once)

    def test_installed_packages_are_not_learned(self, program, tmp_path):
        (tmp_path / "site-packages").mkdir()
        (tmp_path / "site-packages" / "m.py").write_text("x = 1")
        assert [side.size for side in program.byte_lm.read_corpus(tmp_path)] == [0, 0]

    def test_batches_are_windows_of_the_text_and_repeat_by_seed(self, program):
        text = jnp.arange(200, dtype=jnp.uint8)
        draw = lambda seed, step: program.byte_lm.draw_batch(  # noqa: E731
            text, jax.random.key(seed), step, batch=64, seq_len=5
        )
        batch = draw(0, 3)
        chex.assert_shape(batch, (64, 6))
        chex.assert_type(batch, jnp.int32)
        assert np.all(np.diff(batch) == 1)
        chex.assert_trees_all_equal(batch, draw(0, 3))
        assert np.any(batch != draw(0, 4))
        assert np.any(batch != draw(1, 3))

    def test_last_byte_can_be_drawn(self, program):
        text = jnp.arange(7, dtype=jnp.uint8)
        batch = program.byte_lm.draw_batch(
            text, jax.random.key(0), 0, batch=64, seq_len=5
        )
        assert np.max(batch) == 6
        assert np.min(batch) == 0

    def test_heldout_windows_span_the_text(self, program):
        text = np.arange(10_000) % 251
        config = program.PRESETS["cpu"]
        batches = program.byte_lm.heldout_batches(text, config.batch, config.seq_len)
        chex.assert_shape(batches, (None, config.batch, config.seq_len + 1))
        assert batches[0, 0, 0] == text[0]
        assert batches[-1, -1, -1] == text[-1]
