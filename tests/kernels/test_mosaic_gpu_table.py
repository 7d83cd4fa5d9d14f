"""The table of measured configs: what it gives, and everything it refuses."""

import json
import os

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax.kernels import mosaic_gpu
from fp8jax.kernels.mosaic_gpu import Entry, GemmConfig, GemmProblem, Table
from fp8jax.kernels.mosaic_gpu import _choose as choose

DEVICE, SMS = "NVIDIA H200", 132
PROBLEM = GemmProblem("1d2d", 4000, 7168, 2048, "bfloat16")
HERE = {"device_kind": DEVICE, "num_sms": SMS}


def other_config(problem=PROBLEM) -> GemmConfig:
    p = problem
    candidates = mosaic_gpu.gemm_candidates(p.kind, p.m, p.n, p.k, p.out_dtype, SMS)
    return candidates[-1]


@pytest.fixture
def path(tmp_path):
    """A table with one entry, of a config that is not the computed one."""
    entry = Entry(PROBLEM, other_config(), 80.5, 90.25)
    file = tmp_path / "table.json"
    mosaic_gpu.write_table(file, Table(DEVICE, SMS, {}).updated([entry]))
    return file


@pytest.fixture
def on_that_gpu(monkeypatch):
    monkeypatch.setattr(choose, "present_device_kind", lambda: DEVICE)
    monkeypatch.setattr(choose, "num_sms", lambda: SMS)
    yield
    fp8jax.load_tuning(None)


def chosen(m=4000, n=7168, k=2048, out_dtype="bfloat16", kind="1d2d", sms=SMS):
    return mosaic_gpu.choose_config(kind, m, n, k, out_dtype, sms)


def computed(m=4000, n=7168, k=2048, out_dtype="bfloat16", kind="1d2d", sms=SMS):
    return mosaic_gpu.computed_config(kind, m, n, k, out_dtype, sms)


def test_what_is_written_is_read(path):
    table = mosaic_gpu.read_table(path, **HERE)
    assert table == Table(
        DEVICE, SMS, {PROBLEM.key: Entry(PROBLEM, other_config(), 80.5, 90.25)}
    )


@pytest.mark.usefixtures("on_that_gpu")
def test_an_entry_holds_for_its_bucket_and_nothing_else(path):
    assert chosen() == computed()
    fp8jax.load_tuning(path)
    assert chosen() == chosen(m=3585) == chosen(m=4096) == other_config() != computed()
    for shape in (
        {"m": 3584},
        {"m": 4097},
        {"n": 7169},
        {"k": 2176},
        {"out_dtype": "float32"},
        {"kind": "1d1d"},
        {"sms": 114},
    ):
        assert chosen(**shape) == computed(**shape), shape
    fp8jax.load_tuning(None)
    assert chosen() == computed()


@pytest.mark.usefixtures("on_that_gpu")
def test_functions_traced_before_take_the_new_config(path):
    traces = []

    @jax.jit
    def f(x):
        traces.append(chosen())
        return x

    one = jnp.ones(())
    for table in (None, path, path, None):
        fp8jax.load_tuning(table)
        f(one)
    # Loading the same table again compiles nothing anew.
    assert traces == [computed(), other_config(), computed()]


@pytest.mark.parametrize("m", [*range(1, 300), 511, 512, 513, 4096, 4097, 65536])
def test_buckets_leave_no_gap(m):
    def bucket(m):
        return GemmProblem("1d2d", m, 1, 1, "bfloat16").bucket

    low, high = bucket(m)
    assert low <= m <= high
    assert bucket(low) == bucket(high) == (low, high)
    assert bucket(high + 1)[0] == high + 1
    assert m <= 256 or high <= 1.25 * low


def edited(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


def edited_entry(path, config=(), **changes):
    record = json.loads(path.read_text())
    record["entries"][0] |= changes
    record["entries"][0]["config"] |= dict(config)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_text("{"), "is no JSON"),
        (lambda p: p.write_text("[]"), "has schema None, this fp8jax reads 1"),
        (lambda p: edited(p, schema=2), "has schema 2, this fp8jax reads 1"),
        (lambda p: edited(p, device_kind="H20"), "on H20 with 132 SMs, .* H200 with"),
        (lambda p: edited(p, num_sms=78), "with 78 SMs, .* with 132"),
        (lambda p: edited(p, kernel_revision="old"), "with kernels old .*, these are"),
        (lambda p: edited(p, entries=3), "has no list of entries"),
        (lambda p: edited(p, entries=[3]), "entry 0 has unknown fields"),
        (lambda p: edited_entry(p, kind="2d2d"), "for a GEMM '2d2d' to 'bfloat16'"),
        (lambda p: edited_entry(p, out_dtype="int8"), "'1d2d' to 'int8'"),
        (lambda p: edited_entry(p, m=0), "has m=0, n=7168, k=2048"),
        (lambda p: edited_entry(p, us=None), "has times"),
        (lambda p: edited_entry(p, speed=1), r"unknown fields \['speed'\]"),
        (lambda p: edited_entry(p, {"block_q": 1}), r"unknown fields \['block_q'\]"),
        (lambda p: edited_entry(p, {"block_m": "128"}), "config of block_m='128'"),
        (lambda p: edited_entry(p, {"split": "k"}), "split='k'"),
        (lambda p: edited_entry(p, {"stages": 40}), "bytes of shared memory"),
        (lambda p: edited_entry(p, {"stages": 0}), "a size below 1"),
    ],
)
@pytest.mark.usefixtures("on_that_gpu")
def test_a_wrong_or_stale_table_is_refused_in_one_line(path, tmp_path, change, message):
    good = tmp_path / "good.json"
    good.write_bytes(path.read_bytes())
    fp8jax.load_tuning(good)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        fp8jax.load_tuning(path)
    assert str(error.value).startswith(f"tuning table {path}: ")
    assert "\n" not in str(error.value)
    assert chosen() == other_config()  # The table loaded before stays.


@pytest.mark.usefixtures("on_that_gpu")
def test_two_entries_for_one_bucket_are_refused(path):
    record = json.loads(path.read_text())
    (entry,) = record["entries"]
    edited(path, entries=[entry, entry | {"m": 3800}])
    with pytest.raises(ValueError, match="two entries"):
        fp8jax.load_tuning(path)


def test_a_machine_without_that_gpu_refuses_it(path):
    with pytest.raises(ValueError, match="was measured on NVIDIA H200 with 132 SMs"):
        mosaic_gpu.read_table(path, device_kind="no GPU", num_sms=132)


def test_a_table_is_written_whole_or_not_at_all(path, monkeypatch):
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mosaic_gpu.write_table(path, Table(DEVICE, SMS, {}))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_table_is_added_to(path):
    table = mosaic_gpu.read_table(path, **HERE)
    narrow = GemmProblem("1d2d", 16, 7168, 2048, "bfloat16")
    entry = Entry(narrow, other_config(narrow), 4.0, 4.5)
    mosaic_gpu.write_table(path, table.updated([entry]))
    entries = mosaic_gpu.read_table(path, **HERE).entries
    assert set(entries) == {PROBLEM.key, narrow.key}
