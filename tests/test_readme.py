"""README's code runs as it stands."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    for words in ("fprop", "dgrad", "wgrad", "QTensor(shape=(576, 300)"):
        assert words in printed


def test_tables_are_what_the_results_say():
    command = [sys.executable, "-m", "benchmarks.readme", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
