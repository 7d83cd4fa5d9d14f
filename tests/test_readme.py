"""The code in README and docs runs as it stands, and prints what it says."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def blocks_of(name, language="python"):
    text = (ROOT / name).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def run_blocks(name):
    scope = {}
    for block in blocks_of(name):
        exec(compile(block, name, "exec"), scope)
    return scope


def test_python_blocks_run_in_order(capsys):
    assert len(blocks_of("README.md")) == 2
    run_blocks("README.md")
    printed = capsys.readouterr().out
    for words in ("fprop", "dgrad", "wgrad", "QTensor(shape=(576, 300)"):
        assert words in printed


def test_the_report_in_the_docs_is_the_one_that_is_printed(capsys):
    scope = run_blocks("docs/transform.md")
    (report,) = blocks_of("docs/transform.md", "text")
    assert capsys.readouterr().out == report
    told = scope["fp8_step"].report(scope["params"], scope["tokens"])
    assert told.unmatched_rules == ()
    assert sorted((r.path, r.role) for r in told.rows if r.status == "fp8") == [
        ("layers/0/down", "dgrad"),
        ("layers/0/down", "fprop"),
        ("lm_head", "dgrad"),
        ("lm_head", "fprop"),
    ]


def test_tables_are_what_the_results_say():
    command = [sys.executable, "-m", "benchmarks.readme", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_code_in_the_docs_about_tuning_runs(capsys):
    run_blocks("docs/tuning.md")
    assert capsys.readouterr().out


def test_code_in_the_docs_about_checkpoints_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks("docs/checkpoints.md")


def test_code_in_the_docs_about_layers_runs():
    run_blocks("docs/layers.md")


def test_code_in_the_docs_about_sharding_runs():
    run_blocks("docs/sharding.md")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
