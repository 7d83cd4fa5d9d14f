"""The command `fp8jax`: what it prints, its exit status and its errors."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fp8jax import checkpoint, cli


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
    assert exit_.value.code == 1
    assert "1 same bits, 1 same values" in capsys.readouterr().out
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
