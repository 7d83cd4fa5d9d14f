"""Without a package that an extra brings, the error names the extra."""

import subprocess
import sys

import pytest

from fp8jax._extras import needed_by

# As where neither is installed; in a process of its own, which has imported nothing.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import fp8jax

statistics = {"a": {"fprop": {"sqnr_db": [1.0, 2.0]}}}
for use in (
    lambda: fp8jax.nnx,
    lambda: fp8jax.linen,
    lambda: fp8jax.transform.plot_statistics(statistics),
):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error.name, error)
"""


def test_flax_and_matplotlib_are_named_with_their_extras():
    run = [sys.executable, "-W", "ignore", "-c", WITHOUT]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    nnx, linen, plot = said.splitlines()
    missing = "which is missing here: pip install"
    assert nnx == f"flax fp8jax.nnx needs flax, {missing} 'fp8jax[flax]'."
    assert linen == f"flax fp8jax.linen needs flax, {missing} 'fp8jax[flax]'."
    assert plot.startswith("matplotlib")
    assert plot.endswith(f"{missing} 'fp8jax[cli]'.")


@pytest.mark.parametrize("name", ["fp8jax.nothing", None])
def test_our_own_mistakes_stay_as_they_are(name):
    mistake = ModuleNotFoundError("as it was", name=name)
    with pytest.raises(ModuleNotFoundError, match=r"^as it was$"), needed_by("x", "y"):
        raise mistake
