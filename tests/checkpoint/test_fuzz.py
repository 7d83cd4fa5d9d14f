"""A few hundred mutated files; docs/checkpoints.md has the command for 10,000."""

import importlib.util
import pathlib

SCRIPT = pathlib.Path(__file__).with_name("fuzz.py")


def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    counts = fuzz.run(tmp_path, mutations=500, seed=1)
    outcomes = {outcome for _, outcome in counts}
    assert outcomes == {"refused", "read"}
    assert counts.total() == 500
