"""The command `fp8jax`: what it prints, its exit status and its errors."""

import json
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fp8jax
from fp8jax import checkpoint, cli
from fp8jax.checkpoint import Outcome
from fp8jax.cli import _main


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def source(tmp_path):
    x = np.random.default_rng(0).standard_normal((256, 384), np.float32)
    tensors = {
        "layers.0.up.weight": x.astype(jnp.bfloat16),
        "norm.weight": np.ones(384, np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    return str(tmp_path / "in.safetensors")


def test_quantize_inspect_dequantize_and_diff(source, tmp_path, capsys):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    cli.main(["quantize", source, out, "--dry-run"])
    assert "norm.weight" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    cli.main(["quantize", source, out, "--scale", "ue8m0"])
    printed = capsys.readouterr().out
    assert "converted: 1 tensors, 196,608 to 98,310 bytes (50.00%)" in printed
    assert "no matrix" in printed

    cli.main(["inspect", out])
    printed = capsys.readouterr().out
    assert "2 tensors" in printed
    assert "zero" not in printed  # Which headers do not tell.
    cli.main(["inspect", out, "--plot", str(tmp_path / "codes.png")])
    printed = capsys.readouterr().out
    for words in ("float8_e4m3fn", "256x384", "128x128", "float8_e8m0fnu", "2 tensors"):
        assert words in printed
    assert (tmp_path / "codes.png").read_bytes()[:4] == b"\x89PNG"

    cli.main(["dequantize", out, back, "--dtype", "float32"])
    assert "converted: 1 tensors" in capsys.readouterr().out
    assert checkpoint.load(back)["layers.0.up.weight"].dtype == jnp.float32

    with pytest.raises(SystemExit) as exit_:
        cli.main(["diff", out, back])
    assert exit_.value.code == 4  # Another dtype, and the same values.
    assert "1 same bits, 1 same values" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["diff", source, out])
    assert exit_.value.code == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["diff", out, out])
    assert exit_.value.code == 0
    assert "2 same bits" in capsys.readouterr().out


def test_include_and_exclude_reach_the_rules(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    cli.main(["quantize", source, out, "--exclude", "up", "--dry-run"])
    assert "excluded" in capsys.readouterr().out
    cli.main(["quantize", source, out, "--include", "down", "--dry-run"])
    assert "not included" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "none"], "No checkpoint at none"),
        (["quantize", "IN", "IN"], "another folder than the source"),
        (["quantize", "IN", "out", "--include", "("], "regular expressions, got '('"),
        (["inspect", "IN", "--plot", "x.png"], "no FP8 weight to plot"),
        (["quantize", "IN", "out", "--scale", "bf16"], "invalid choice: 'bf16'"),
        ([], "required: command"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, source, tmp_path, capsys):
    arguments = [source if a == "IN" else a for a in arguments]
    if arguments[1:] == [source, source]:
        arguments[2] = str(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_rich_it_says_what_to_install(source, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "fp8jax.cli._view", raising=False)
    monkeypatch.delattr(cli, "_view", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["inspect", source])
    message = "fp8jax needs rich, which is missing here: pip install 'fp8jax[cli]'"
    assert message in capsys.readouterr().err


def run(capsys, *arguments):
    """What a command prints, and its exit code."""
    code = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as exit_:
        code = exit_.code
    return capsys.readouterr(), code


def test_json_of_every_command(source, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    commands = {
        "dry": ["quantize", source, out, "--dry-run"],
        "quantize": ["quantize", source, out],
        "inspect": ["inspect", out],
        "codes": ["inspect", out, "--codes"],
        "dequantize": ["dequantize", out, back],
        "diff": ["diff", source, out],
    }
    found = {
        name: json.loads(run(capsys, *command, "--json")[0].out)
        for name, command in commands.items()
    }
    name = "layers.0.up.weight"
    by_name = {k: {x["name"]: x for x in rows} for k, rows in found.items()}
    assert by_name["dry"][name]["bytes_out"] == 256 * 384 + 6 * 4
    assert 25 < by_name["quantize"][name]["sqnr_db"] < 40
    of_weight = by_name["inspect"][name]
    assert (of_weight["kind"], of_weight["tile"]) == ("tiles", [128, 128])
    assert "zero" not in of_weight
    # Each block's largest weight has the largest code.
    assert by_name["codes"][name]["largest"] >= 6 / (256 * 384)
    assert by_name["dequantize"]["norm.weight"]["note"] == "not FP8"
    assert by_name["diff"][name]["what"] == "differs"
    assert by_name["diff"]["norm.weight"]["what"] == "same bits"


def test_a_pipe_gets_whole_names_and_control_characters_are_spelled_out(
    tmp_path, capsys
):
    name = "a" * 200 + "\x1b[31m\n.weight"
    x = {name: np.ones((128, 128), np.float32)}
    safetensors.numpy.save_file(x, tmp_path / "in.safetensors")
    printed, _ = run(capsys, "inspect", tmp_path / "in.safetensors")
    assert "a" * 200 + r"\x1b[31m\n.weight" in printed.out
    assert "\x1b" not in printed.out


def test_45000_tensors_are_printed_in_seconds(capsys):
    """A quarter of a second here; rich lays such a table out in a minute."""
    view = pytest.importorskip("fp8jax.cli._view")
    outcomes = [Outcome(f"layers.{i}.weight", "", 4, 1, 30.0) for i in range(45_000)]
    start = time.process_time()
    view.show_outcomes(outcomes)
    assert time.process_time() - start < 5
    assert capsys.readouterr().out.count("\n") == 45_000 + 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named_and_exit_with_3(tmp_path, capsys, bad):
    x = np.ones((128, 128), np.float32)
    x[3, 5] = bad
    params = {"a.weight": np.ones((128, 128), np.float32), "b.weight": x}
    safetensors.numpy.save_file(params, tmp_path / "in.safetensors")
    printed, code = run(
        capsys, "quantize", tmp_path / "in.safetensors", tmp_path / "out"
    )
    assert code == 3
    assert printed.err == "fp8jax: NaN or infinities in b.weight\n"
    assert "nan" in printed.out
    assert (tmp_path / "out").exists()


def test_integers_are_compared_exactly(tmp_path, capsys):
    for name, value in (("a", 2**60), ("b", 2**60 + 1)):
        x = {"steps": np.asarray([value], np.int64)}
        safetensors.numpy.save_file(x, tmp_path / f"{name}.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run(capsys, "diff", *files)[1] == 1


def test_a_tile_that_no_config_tells(tmp_path, capsys):
    tensors = {"w": np.zeros((128, 64), jnp.float8_e4m3fn), "w_scale": np.ones((2, 2))}
    tensors["w_scale"] = tensors["w_scale"].astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    assert run(capsys, "inspect", tmp_path)[1] == 2
    printed, code = run(capsys, "inspect", tmp_path, "--tile", "64x32")
    assert code == 0
    assert "64x32" in printed.out


def test_interrupted_it_says_one_line(source, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "quantize_checkpoint", interrupted)
    _, code = run(capsys, "quantize", source, tmp_path / "out")
    assert code == "fp8jax: interrupted; the same command goes on where it was."


def test_every_argument_has_help():
    parser = _main._parser()
    commands = next(a.choices for a in parser._actions if a.dest == "command")
    assert set(commands) == {"quantize", "dequantize", "inspect", "diff"}
    for name, command in commands.items():
        for action in command._actions:
            assert action.help, (name, action.dest)


def test_as_a_module_and_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "fp8jax", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{fp8jax.__version__}\n"
