"""What a run or a save may write to: nothing is lost, nothing blocks a later one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fp8jax import checkpoint
from fp8jax.checkpoint import _lock, _publish, _target

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((128, 256), np.float32)
WEIGHTS = {f"l.{i}.weight": X for i in range(4)}


@pytest.fixture
def source(tmp_path):
    checkpoint.save(tmp_path / "in", WEIGHTS, config={"model_type": "mine"})
    return tmp_path / "in"


def is_whole(folder):
    differences = checkpoint.diff(folder, folder)
    return len(differences) == len(WEIGHTS) and all(
        weight.scale is not None for weight in checkpoint.Reader(folder).values()
    )


def of_folder(source, tmp_path):
    return source, source


def of_a_file_in_it(source, tmp_path):
    return source / "model.safetensors", source


def of_a_link_to_it(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    return source, tmp_path / "link"


def of_a_folder_around_it(source, tmp_path):
    return source, tmp_path


def of_what_it_links_to(source, tmp_path):
    """As a cache of models does: files are links into a folder of blobs."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    file = source / "model.safetensors"
    file.rename(blobs / "one")
    file.symlink_to(blobs / "one")
    return source, blobs


def of_another_spelling(source, tmp_path):
    return f"{tmp_path}/x/../in/", f"{tmp_path}//in/."


@pytest.mark.parametrize(
    "case",
    [
        of_folder,
        of_a_file_in_it,
        of_a_link_to_it,
        of_a_folder_around_it,
        of_what_it_links_to,
        of_another_spelling,
    ],
)
def test_a_source_is_never_destroyed(case, source, tmp_path):
    (tmp_path / "x").mkdir()
    path, target = case(source, tmp_path)
    with pytest.raises(ValueError, match="another folder than the source"):
        checkpoint.quantize_checkpoint(path, target, overwrite=True)
    reader = checkpoint.Reader(source)
    assert reader["l.0.weight"].stored.dtype == np.float32
    assert reader.config == {"model_type": "mine"}


def test_a_result_within_the_source_is_no_copy_of_itself(source, tmp_path):
    (source / "sub").mkdir()
    (source / "sub" / "notes.txt").write_text("kept")
    os.mkfifo(source / "pipe")
    checkpoint.quantize_checkpoint(source, source / "fp8")
    assert sorted(os.listdir(source / "fp8")) == [
        "config.json",
        "model.safetensors",
        "sub",
    ]
    assert (source / "fp8" / "sub" / "notes.txt").read_text() == "kept"
    assert is_whole(source / "fp8")


def test_a_linked_target_stays_a_link(source, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "notes.txt").write_text("kept")
    (real / "nowhere").symlink_to(tmp_path / "gone")
    (real / "elsewhere").symlink_to(source)
    link = tmp_path / "link"
    link.symlink_to(real)
    for _ in range(2):  # And what the first one leaves blocks no second.
        checkpoint.quantize_checkpoint(source, link, overwrite=True)
        checkpoint.save(link, WEIGHTS)
    assert link.is_symlink()
    assert (real / "notes.txt").read_text() == "kept"
    assert (real / "nowhere").is_symlink()
    assert (real / "elsewhere").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["in", "link", "real"]


def test_a_dangling_link_leads_to_what_is_made(source, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "made")
    checkpoint.quantize_checkpoint(source, link)
    assert is_whole(tmp_path / "deep" / "made")


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be written before a target is refused."""

    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("fp8jax.checkpoint._stream._written", work)
    monkeypatch.setattr("fp8jax.checkpoint._save.ShardWriter", work)


def refused(source, target, error, match):
    with pytest.raises(error, match=match):
        checkpoint.quantize_checkpoint(source, target, overwrite=True)
    with pytest.raises(error, match=match):
        checkpoint.save(target, WEIGHTS)


def test_what_cannot_be_replaced_is_refused_before_any_work(
    source, tmp_path, no_work, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "pipe")
    refused(source, out, ValueError, "pipe is no file, folder or link")
    (out / "pipe").unlink()
    (out / "sub").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(out / "sub")
        listening.bind("s")
    refused(source, out, ValueError, "s is no file, folder or link")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    refused(source, tmp_path / "round", ValueError, "leads to no place")
    monkeypatch.setattr(_target.os.path, "ismount", lambda path: True)
    refused(source, tmp_path / "new", ValueError, "is a mount point")


def test_an_unreadable_file_is_refused_and_not_lost(
    source, tmp_path, no_work, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "secret").write_text("x")
    monkeypatch.setattr(_target.os, "access", lambda *_: False)  # Root may read all.
    refused(source, out, PermissionError, "secret cannot be read")


def test_what_an_older_save_left_blocks_no_later_one(source, tmp_path):
    (tmp_path / ".out.saving").symlink_to(tmp_path / "gone")
    (tmp_path / ".out.partial").write_text("odd")
    checkpoint.save(tmp_path / "out", WEIGHTS)
    checkpoint.quantize_checkpoint(source, tmp_path / "out", overwrite=True)
    assert is_whole(tmp_path / "out")


# One writer at a time.


def test_a_second_run_or_save_ends_with_a_clear_line(source, tmp_path):
    out = tmp_path / "out"

    def meanwhile(_):
        with pytest.raises(ValueError, match=r"Another run is writing .*out"):
            checkpoint.quantize_checkpoint(source, out)
        with pytest.raises(ValueError, match=r"Another run is writing .*out"):
            checkpoint.save(out, WEIGHTS)

    checkpoint.quantize_checkpoint(source, out, progress=meanwhile)
    assert is_whole(out)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_run_that_ended_while_another_waited_is_not_replaced(
    source, tmp_path, monkeypatch
):
    out, plain = tmp_path / "out", _lock.held

    def held(target):
        monkeypatch.setattr("fp8jax.checkpoint._stream.held", plain)
        checkpoint.quantize_checkpoint(source, out)
        return plain(target)

    monkeypatch.setattr("fp8jax.checkpoint._stream.held", held)
    with pytest.raises(ValueError, match="out is there already"):
        checkpoint.quantize_checkpoint(source, out)
    assert is_whole(out)


def test_a_lock_that_a_killed_process_left_is_nobodys(source, tmp_path):
    code = (
        "import os, sys, time\nfrom fp8jax.checkpoint._lock import held\n"
        "with held(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="Another run"):
        checkpoint.save(tmp_path / "out", WEIGHTS)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".out.lock").exists()
    checkpoint.save(tmp_path / "out", WEIGHTS)
    assert not (tmp_path / ".out.lock").exists()


def test_a_lock_file_that_its_holder_removed_is_asked_for_anew(tmp_path, monkeypatch):
    """Between a waiter's open and its flock: two would hold two files of one name."""
    target, plain = str(tmp_path / "out"), _lock.fcntl.flock
    removed = []

    def flock(file, how):
        if not removed:
            removed.append(True)
            os.remove(tmp_path / ".out.lock")
        plain(file, how)

    monkeypatch.setattr(_lock.fcntl, "flock", flock)
    again = _lock.held(target)
    with _lock.held(target), pytest.raises(ValueError, match="Another run"):
        again.__enter__()
    assert os.listdir(tmp_path) == []


# Killed at any moment.


def killed(source, out, code):
    """Runs a quantization that kills itself where `code` says."""
    head = (
        "import os, signal, sys\n"
        "from fp8jax import checkpoint\n"
        "from fp8jax.checkpoint import _publish, _stream\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tail = (
        "\ncheckpoint.quantize_checkpoint(sys.argv[1], sys.argv[2], overwrite=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail, str(source), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def anew(source, out, monkeypatch):
    """How many weights a run quantizes that goes on there."""
    made, plain = [], checkpoint._offline.quantize_band

    def counted(*args):
        made.append(args)
        return plain(*args)

    monkeypatch.setattr(checkpoint._offline, "quantize_band", counted)
    checkpoint.quantize_checkpoint(source, out, overwrite=True)
    return len(made)


@pytest.mark.parametrize(
    "code",
    [
        "_stream.publish = die",
        "_publish._flush = die",
        "_publish.os.rename = _publish._exchange = die",
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_killed_while_it_publishes_it_does_nothing_twice(
    code, is_there, source, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if is_there:
        checkpoint.save(out, {"old.weight": X})
    killed(source, out, code)
    assert out.exists() == is_there
    assert not is_there or list(checkpoint.Reader(out)) == ["old.weight"]
    assert anew(source, out, monkeypatch) == 0
    assert is_whole(out)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_killed_after_the_exchange_the_old_files_are_not_taken_for_new(
    source, tmp_path, monkeypatch
):
    """They lie where the run's did, and may have the same names and sizes."""
    out = tmp_path / "out"
    checkpoint.quantize_checkpoint(source, out)
    old = dict.fromkeys(WEIGHTS, X * 3)
    checkpoint.save(tmp_path / "other", old)
    checkpoint.quantize_checkpoint(tmp_path / "other", out, overwrite=True)
    killed(source, out, "_publish.shutil.rmtree = die")
    assert anew(source, out, monkeypatch) == len(WEIGHTS)
    checkpoint.quantize_checkpoint(source, tmp_path / "b")
    differences = checkpoint.diff(out, tmp_path / "b")
    assert {d.what for d in differences} == {"same bits"}


def test_damage_costs_its_tensor_and_a_lost_shard_its_own(
    source, tmp_path, monkeypatch
):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    expected = tmp_path / "expected"
    checkpoint.quantize_checkpoint(source, expected)
    killed(source, out, "_stream.publish = die")
    journal = partial / "progress.jsonl"
    lines = journal.read_text().split("\n")
    tensors = [i for i, line in enumerate(lines) if '"name"' in line]
    lines[tensors[1]] = lines[tensors[1]][:20]
    lines[tensors[2]] = '{"name": "l.1.weight", "odd": 1}'
    lines.insert(0 + len(lines) - 1, "[1, 2]")
    journal.write_text("\n".join(lines))
    assert anew(source, out, monkeypatch) == 2
    assert {d.what for d in checkpoint.diff(out, expected)} == {"same bits"}

    killed(source, tmp_path / "c", "_stream.publish = die")
    os.truncate(tmp_path / ".c.partial" / "model.safetensors", 100)
    assert anew(source, tmp_path / "c", monkeypatch) == len(WEIGHTS)
    assert {d.what for d in checkpoint.diff(tmp_path / "c", expected)} == {"same bits"}


def test_after_another_start_of_the_machine_only_what_was_synced_counts(
    source, tmp_path, monkeypatch
):
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "progress.jsonl"
    killed(source, out, "_stream.publish = die")
    lines = [line for line in journal.read_text().split("\n") if "synced" not in line]
    lines.insert(3, '{"synced": 2}')
    journal.write_text("\n".join(lines))
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr("fp8jax.checkpoint._journal._BOOT", boot)
    assert anew(source, out, monkeypatch) == len(WEIGHTS) - 2


def test_another_version_begins_anew(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(source, out, "_stream.publish = die")
    monkeypatch.setattr("fp8jax.checkpoint._stream.__version__", "0.0.1")
    assert anew(source, out, monkeypatch) == len(WEIGHTS)


def test_marks_come_while_a_run_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr("fp8jax.checkpoint._write._FLUSH_SECONDS", 0.001)
    seen = []
    plain = _publish.publish

    def looked_at(staging, path, **options):
        seen.append((Path(staging) / "progress.jsonl").read_text())
        plain(staging, path, **options)

    monkeypatch.setattr("fp8jax.checkpoint._stream.publish", looked_at)
    out = tmp_path / "out"
    checkpoint.quantize_checkpoint(source, out, progress=lambda _: time.sleep(0.02))
    assert '"synced": ' in seen[0]
