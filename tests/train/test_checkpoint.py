import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import time

import pytest
import safetensors.torch
import torch
from tiny_run import Fork, run

from minibert.train import checkpoint
from minibert.train.checkpoint import CheckpointError, claim, latest, save, steps, verify


def content(step):
    """Files of a checkpoint that are a function of its step."""

    def write(directory):
        weights = {"w": torch.full((173, 37), float(step)), "b": torch.arange(37) + step}
        safetensors.torch.save_file(weights, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"step": step}))
        (directory / "vocab.txt").write_text("word\n" * (step + 1))

    return write


def assert_is_step(directory, step):
    verify(directory)
    assert directory.name == f"step-{step}"
    assert json.loads((directory / "config.json").read_text()) == {"step": step}
    assert torch.equal(
        safetensors.torch.load_file(directory / "model.safetensors")["w"], torch.full((173, 37), float(step))
    )


def flip(path, offset, bit):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "nothing") is None
    for step in (9, 10, 100):
        save(tmp_path, step, content(step), keep_last=5)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-007").mkdir()
    (tmp_path / "step-999").write_text("a file")
    assert steps(tmp_path) == [9, 10, 100]
    assert_is_step(latest(tmp_path), 100)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, content(step), keep_last=2, best=min(step, 2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-2", "step-5", "step-6"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    save(tmp_path, 1, content(1))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    save(tmp_path, 2, content(2), keep_last=1)
    assert steps(tmp_path) == [2]
    monkeypatch.undo()
    checkpoint.sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-2"]


def test_a_step_that_is_saved_is_left_alone_and_a_damaged_one_is_written_again(tmp_path):
    directory = save(tmp_path, 3, content(3))
    save(tmp_path, 3, lambda _: pytest.fail("written again"))
    flip(directory / "vocab.txt", 1, 0)
    save(tmp_path, 3, content(3))
    assert_is_step(directory, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-3"]


def test_damaged_later_steps_do_not_push_out_the_one_just_saved(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, content(step), keep_last=3)
    for step in (2, 3):
        flip(tmp_path / f"step-{step}" / "vocab.txt", 0, 0)
    assert_is_step(latest(tmp_path), 1)
    save(tmp_path, 2, content(2), keep_last=1)
    assert_is_step(latest(tmp_path), 2)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_may_read_a_run(tmp_path, umask):
    before = os.umask(umask)
    try:
        run(tmp_path / "run")
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        whole = 0o777 if path.is_dir() else 0o644 if path.name == ".lock" else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~umask, path


def test_files_that_a_writer_left_behind_are_not_saved(tmp_path):
    def write(directory):
        content(1)(directory)
        (directory / ".tmpAb12Cd").write_bytes(b"half")

    assert_is_step(save(tmp_path, 1, write), 1)
    assert not (tmp_path / "step-1" / ".tmpAb12Cd").exists()


def test_every_file_is_flushed_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, checkpoint.Path.rename
    monkeypatch.setattr("os.fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(
        checkpoint.Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1]
    )
    save(tmp_path, 1, content(1))
    partial, middle = tmp_path / "step-1.tmp", events.index("rename")
    before, after = set(events[:middle]), events[middle + 1 :]
    assert {str(partial / name) for name in ("model.safetensors", "config.json", "vocab.txt")} < before
    assert str(partial) in before and any("manifest" in event for event in before)
    assert after == [str(tmp_path)]


def kill_while_saving(run_dir, times, rng):
    """Kill a child at random moments of its saves. Returns how often it was in the middle of one."""
    middle, started = 0, 0
    for _ in range(times):
        reader, writer = os.pipe()

        def work(first=started + 1, writer=writer):
            checkpoint.sweep(run_dir)
            for step in range(first, first + 1000):
                save(run_dir, step, content(step), keep_last=2)
                os.write(writer, step.to_bytes(4, "little"))

        child = Fork(work)
        os.close(writer)
        started = int.from_bytes(os.read(reader, 4), "little")
        child.kill_after(rng.uniform(0, 0.03))
        with os.fdopen(reader, "rb") as told:
            done = told.read()
        started = int.from_bytes(done[-4:], "little") if done else started
        middle += any(entry.name.endswith(".tmp") for entry in run_dir.iterdir())
        newest = latest(run_dir)
        # what was reported as saved is there; the kill may have come between the saving and the report
        assert int(newest.name[5:]) in (started, started + 1)
        started = int(newest.name[5:])
        assert_is_step(newest, started)
    return middle


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    assert kill_while_saving(tmp_path, 15, random.Random(5)) > 0


@pytest.mark.slow
def test_two_hundred_kills_while_saving_leave_a_checkpoint_that_loads(tmp_path):
    assert kill_while_saving(tmp_path, 200, random.Random(6)) > 20


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt", "manifest.json"])
def test_truncations_changed_headers_and_flipped_bits_are_detected_and_the_file_is_named(tmp_path, name):
    save(tmp_path, 5, content(5), keep_last=9)
    directory, rng = save(tmp_path, 6, content(6), keep_last=9), random.Random(name)
    whole = (directory / name).read_bytes()
    for trial in range(24):
        if trial % 3 == 0:
            (directory / name).write_bytes(whole[: rng.randrange(len(whole))])
        else:
            flip(
                directory / name, rng.randrange(min(len(whole), 80 if trial % 3 == 1 else len(whole))), rng.randrange(8)
            )
        with pytest.raises(ValueError) as caught:
            verify(directory)
        assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
        assert name in str(caught.value) or name == "manifest.json"
        assert latest(tmp_path).name == "step-5"
        (directory / name).write_bytes(whole)
    assert_is_step(latest(tmp_path), 6)


def test_missing_and_extra_files_are_named(tmp_path):
    directory = save(tmp_path, 6, content(6))
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not in manifest\.json"):
        verify(directory)
    (directory / "model.safetensors.index.json").rename(tmp_path / "aside")
    (directory / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab\.txt is missing"):
        verify(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        verify(directory)
    with pytest.raises(ValueError, match="no such directory"):
        verify(tmp_path / "step-7")


def test_a_model_card_may_be_edited_and_removed(tmp_path):
    def write(directory):
        content(6)(directory)
        (directory / "README.md").write_text("# A model")

    directory = save(tmp_path, 6, write)
    (directory / "README.md").write_text("# My model")
    assert_is_step(latest(tmp_path), 6)
    (directory / "README.md").unlink()
    assert_is_step(latest(tmp_path), 6)


def test_a_damaged_newest_is_passed_over_with_a_warning_and_all_damaged_is_an_error(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step, content(step))
    flip(tmp_path / "step-2" / "model.safetensors", -1, 3)
    assert_is_step(latest(tmp_path), 1)
    assert len(caplog.records) == 1 and "step-2/model.safetensors" in caplog.text
    flip(tmp_path / "step-1" / "vocab.txt", 0, 3)
    with pytest.raises(ValueError, match=r"no checkpoint that is whole: .*step-2/model\.safetensors"):
        latest(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename", "pathlib.Path.write_text"])
def test_a_save_that_fails_leaves_the_one_before_and_nothing_else(tmp_path, monkeypatch, where, code):
    save(tmp_path, 1, content(1))

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(
            CheckpointError, match=f"step-2 could not be saved: {os.strerror(code)}; step-1 is as it was"
        ):
            save(tmp_path, 2, content(2), keep_last=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]
    assert_is_step(latest(tmp_path), 1)


def test_a_full_disk_is_one_clear_line_and_the_checkpoint_before_is_intact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        save(disk, 1, content(1))
        with pytest.raises(CheckpointError, match=r"step-4 could not be saved: .*No space left.*; step-3 is as it was"):
            for step in (2, 3, 4):
                save(disk, step, content(1 if step < 4 else 40_000), keep_last=1, best=1)
        assert sorted(entry.name for entry in disk.iterdir()) == ["step-1", "step-3"]
        verify(disk / "step-1")
        verify(disk / "step-3")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_another_error_of_the_writer_passes_through_and_leaves_nothing(tmp_path):
    def write(directory):
        content(1)(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, write)
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time_holds_a_run_directory(tmp_path):
    with claim(tmp_path) as run:
        assert run.path == tmp_path and not run.resume
        with (
            pytest.raises(ValueError, match=rf"{tmp_path} is in use by another process \(pid {os.getpid()}\)"),
            claim(tmp_path),
        ):
            pytest.fail("held twice")
        (tmp_path / "config.yaml").write_text("kept")
    with claim(tmp_path):
        assert (tmp_path / "config.yaml").exists()


def test_a_killed_holder_holds_no_longer(tmp_path):
    reader, writer = os.pipe()

    def work():
        with claim(tmp_path):
            os.write(writer, b"x")
            time.sleep(60)

    child = Fork(work)
    os.read(reader, 1)
    with pytest.raises(ValueError, match=rf"pid {child.pid}"), claim(tmp_path):
        pytest.fail("held twice")
    child.kill_after(0)
    os.close(reader), os.close(writer)
    with claim(tmp_path) as run:
        assert run.path == tmp_path


def test_a_lock_that_its_holder_removed_as_we_came_is_not_held(tmp_path, monkeypatch):
    flock = fcntl.flock

    def remove_first(handle, operation):
        (tmp_path / "run" / ".lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with pytest.raises(ValueError, match="in use by another process"), claim(tmp_path / "run"):
        pytest.fail("held, but by a file that nobody else can see")


def test_a_disk_too_full_for_the_pid_can_be_held(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with claim(tmp_path) as run:
        assert run.path == tmp_path


def test_a_directory_that_got_nothing_is_removed_again(tmp_path):
    with pytest.raises(ValueError, match="bad data"), claim(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
        raise ValueError("bad data")
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "step-5"])
def test_a_directory_with_a_run_is_refused_unless_it_is_resumed(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run"), claim(tmp_path):
        pytest.fail("held")
    with claim(tmp_path, resume=True) as run:
        assert run.resume


def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    (tmp_path / "step-5.tmp").mkdir()
    (tmp_path / "step-5.tmp" / "model.safetensors").write_text("half")
    (tmp_path / "step-3.old.tmp").mkdir()
    for name in (".metrics.jsonl.12.tmp", ".config.yaml.13.tmp", ".run.json.14.tmp"):
        (tmp_path / name).write_text("half")
    for name in ("notes.tmp", ".notes.tmp"):
        (tmp_path / name).write_text("mine")
    with claim(tmp_path):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", ".notes.tmp", "notes.tmp"]


def test_a_place_that_is_no_directory_to_write_into_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nothing/run"):
        with pytest.raises(ValueError, match=f"{path} is no directory to write into"), claim(path):
            pytest.fail("held")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"), claim(tmp_path / "run"):
        pytest.fail("held")
