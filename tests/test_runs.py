"""The run folder: whole checkpoints, one writer, repaired logs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from accord import disk
from accord.checkpoints import Checkpoints
from accord.disk import append_lines, file_digest, read_lines, whole_folder, write_whole
from accord.errors import UserError
from accord.runs import Run


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "r", {"command": "rl"})


def save(run, step, score=None):
    run.save(step, {"x": torch.full((3,), float(step))}, {"kl": {"coef": step}}, score)


def test_the_newest_two_and_the_best_are_kept(run):
    for step, score in [(1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, 0.2)]:
        save(run, step, score)
    assert [step for step, _, _ in run.saved.all()] == [2, 4, 5]
    saved = run.latest()
    assert saved.step == 5 and saved.tensors["x"].tolist() == [5, 5, 5] and saved.about == {"kl": {"coef": 5}}


def test_what_a_killed_process_would_have_dropped_is_dropped(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_drop_old", lambda self: None)
        for step in (1, 2, 3):
            save(run, step)
    assert run.latest().step == 3
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-2", "step-3"]


def test_every_flipped_byte_of_a_checkpoint_is_seen_and_the_one_before_is_used(run):
    save(run, 1)
    save(run, 2)
    flipped = 0
    for name in ("state.safetensors", "manifest.json", "SHA256SUMS"):
        file = run.folder / "checkpoints" / "step-2" / name
        data = file.read_bytes()
        for at in range(len(data)):
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            assert run.saved.newest().step == 1, (name, at)
            flipped += 1
        file.write_bytes(data)
    assert run.saved.newest().step == 2 and flipped > 300


def test_anyone_can_check_a_checkpoint(run):
    save(run, 1)
    folder = run.folder / "checkpoints" / "step-1"
    assert subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0


def test_a_checkpoint_of_the_format_before_is_read(run):
    """Format 2: the state's checksum in the manifest, no SHA256SUMS."""
    save(run, 1)
    folder = run.folder / "checkpoints" / "step-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2, "sha256": file_digest(folder / "state.safetensors")}))
    (folder / "SHA256SUMS").unlink()
    assert run.saved.newest().tensors["x"].tolist() == [1, 1, 1]
    (folder / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="whole"):
        run.saved.newest()


@pytest.mark.parametrize("score", ["0.5", [1], {"a": 1}, True, 1e308])
def test_a_manifest_that_was_changed_decides_nothing(run, score):
    """Neither which checkpoints are kept, nor anything else, with or without checksums beside it."""
    for step in (1, 2):
        save(run, step, score=0.5)
    path = run.folder / "checkpoints" / "step-1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "score": score, "step": 9}))
    save(run, 3, score=0.9)
    assert run.latest().step == 3
    (path.parent / "SHA256SUMS").unlink()
    assert run.latest().step == 3


def test_a_checkpoint_without_manifest_is_no_checkpoint(run):
    save(run, 1)
    save(run, 2)
    (run.folder / "checkpoints" / "step-2" / "manifest.json").write_text("{")
    assert run.latest().step == 1


def test_logs_are_cut_back_to_the_checkpoint(run):
    run.log(-1, {"self_test/ratio": 0.0}, [])
    for step in range(4):
        run.log(step, {"score": step}, [{"step": step, "completion": "x"}])
        if step == 1:
            save(run, 2)
    run.latest()
    assert [m["step"] for m in run.read("metrics.jsonl")] == [-1, 0, 1]
    assert [c["step"] for c in run.read("completions.jsonl")] == [0, 1]


def test_a_torn_line_is_repaired(run):
    run.log(0, {"score": 1.0}, [])
    with (run.folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 1, "sco')
    run.close()
    again, _ = Run.open(run.folder)
    assert again.read("metrics.jsonl") == [{"step": 0, "score": 1.0}]


def test_lines_end_at_newlines_only(run):
    """JSON may hold U+2028, at which str.splitlines would cut."""
    run.log(0, {"score": 1.0}, [{"step": 0, "completion": "a\u2028b\x85c"}])
    save(run, 1)
    run.latest()
    assert run.read("completions.jsonl")[0]["completion"] == "a\u2028b\x85c"


def test_when_no_checkpoint_is_whole_the_logs_are_not_deleted(run):
    run.log(0, {"score": 1.0}, [])
    save(run, 1)
    (run.folder / "checkpoints" / "step-1" / "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"No checkpoint .* is whole"):
        run.latest()
    assert run.read("metrics.jsonl")


def test_a_file_size_limit_is_a_sentence(run, tmp_path):
    """A real failing write, as of a full disk, in a process of its own."""
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from accord.errors import UserError
from accord.runs import Run
run, _ = Run.open(Path({str(run.folder)!r}))
run.save(1, {{"x": torch.zeros(10)}}, {{}}, None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save(2, {{"x": torch.zeros(1_000_000)}}, {{}}, None)
except UserError as error:
    print("told:", error)
print(sorted(p.name for p in (run.folder / "checkpoints").iterdir()))
"""
    run.close()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "told: Cannot write to" in done.stdout and "accord resume" in done.stdout, done.stdout + done.stderr
    assert "['step-1']" in done.stdout


def test_one_writer(run):
    with pytest.raises(UserError, match="in use by another"):
        Run.open(run.folder)
    run.close()
    Run.open(run.folder)


def test_an_existing_folder_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"already exists.*accord resume"):
        Run.create(run.folder, {})
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", {})


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        Run.open(tmp_path)


def test_a_full_disk_keeps_what_is_there(run, monkeypatch):
    """The write fails half-way: a sentence, the old checkpoint whole, nothing half-written left."""
    save(run, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accord.checkpoints.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*accord resume"):
        save(run, 2)
    assert os.listdir(run.folder / "checkpoints") == ["step-1"]
    assert run.latest().step == 1


def test_newer_formats_are_refused_with_the_version_that_reads_them(run):
    save(run, 1)
    folder = run.folder / "checkpoints" / "step-1"
    path = folder / "manifest.json"
    before = file_digest(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99, "accord": "9.9"}))
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, file_digest(path)))
    with pytest.raises(UserError, match=r"format 99, written by accord 9\.9"):
        run.latest()


# Settings and inputs that are not those of the start.


def config(steps=3, lr=0.1):
    return {"command": "rl", "model": "m", "rl": {"max_steps": steps, "learning_rate": lr}}


def edit(folder, **changes):
    (folder / "config.yaml").write_text(json.dumps(config(**changes)))


def test_a_setting_that_only_says_when_to_stop_may_change(tmp_path, capsys):
    Run.create(tmp_path / "r", config()).close()
    edit(tmp_path / "r", steps=5)
    run, given = Run.open(tmp_path / "r")
    assert given["rl"]["max_steps"] == 5 and "rl.max_steps 3 -> 5" in capsys.readouterr().out
    assert len(run.read("history.jsonl")) == 1  # nothing was made with it yet
    run.log(0, {"score": 1.0}, [])
    assert run.read("history.jsonl")[-1]["changes"] == [{"setting": "rl.max_steps", "from": 3, "to": 5}]
    run.close()
    Run.open(tmp_path / "r")[0].close()
    assert len(run.read("history.jsonl")) == 2  # the same again is no change


def test_another_setting_is_refused_by_name_unless_allowed(tmp_path):
    Run.create(tmp_path / "r", config()).close()
    edit(tmp_path / "r", lr=0.2)
    with pytest.raises(UserError, match=r"rl\.learning_rate \(it was 0\.1, it is 0\.2\).*--allow-changes"):
        Run.open(tmp_path / "r")
    run, _ = Run.open(tmp_path / "r", allow_changes=True)  # which the refusal has not left locked
    run.log(0, {"score": 1.0}, [])
    save(run, 7)
    run.close()
    edit(tmp_path / "r", lr=0.1)
    with pytest.raises(UserError, match=r"it was 0\.2, it is 0\.1"):  # what was accepted is what counts now
        Run.open(tmp_path / "r")
    run, _ = Run.open(tmp_path / "r", allow_changes=True)
    run.log(7, {"score": 1.0}, [])
    assert [row.get("step") for row in run.read("history.jsonl")] == [None, 0, 7]


def test_other_inputs_are_refused_by_name(tmp_path):
    run = Run.create(tmp_path / "r", config())
    run.agree("inputs", {"model": "a", "prompts": "b"}, "to read")
    run.agree("inputs", {"model": "a", "prompts": "b"}, "to read")
    with pytest.raises(UserError, match=r"to read: prompts \(it was 'b', it is 'c'\)"):
        run.agree("inputs", {"model": "a", "prompts": "c"}, "to read")


def test_a_start_that_ended_at_once_is_no_run(tmp_path):
    """Killed before config.yaml was there: the same command starts again."""
    Run.create(tmp_path / "r", config()).close()
    (tmp_path / "r" / "config.yaml").unlink()
    run = Run.create(tmp_path / "r", config(steps=7))
    run.close()
    assert Run.open(tmp_path / "r")[1] == config(steps=7) and run.read("history.jsonl") == [{"config": config(steps=7)}]


# Disks.


def test_lines_are_appended_all_or_none(tmp_path):
    """A write that really fails half-way: the file-size limit cuts it in the middle of the second row."""
    program = f"""
import resource, signal
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from accord.disk import append_lines
from accord.errors import UserError
path = Path({str(tmp_path / "log.jsonl")!r})
append_lines(path, [{{"step": 0}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    append_lines(path, [{{"step": 1}}, {{"text": "x" * 2000}}])
except UserError as error:
    print("told:", error)
append_lines(path, [{{"step": 2}}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "told: Cannot write to" in done.stdout and done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 0}, {"step": 2}]


def test_a_full_disk_is_waited_for(run, monkeypatch, capsys):
    """Too little room for a checkpoint, told before anything is written; then there is room."""
    free = iter([10, 10, 10, 10**12, 10**12])
    monkeypatch.setenv("ACCORD_DISK_WAIT", "60")
    monkeypatch.setattr(disk, "POLL", 0.01)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, next(free)))
    save(run, 1)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("is full") == 1 and "going on" in out and run.saved.newest().step == 1


def test_the_wait_ends_with_a_sentence_and_what_was_whole(run, monkeypatch):
    save(run, 1)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10))
    with pytest.raises(UserError, match=r"No space left|are needed"):
        save(run, 2)
    assert run.saved.newest().step == 1
    monkeypatch.setenv("ACCORD_DISK_WAIT", "long")
    with pytest.raises(UserError, match="must be a number of seconds"):
        save(run, 2)


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path):
    folder = tmp_path / "policy"
    for text in ("one", "two"):
        with whole_folder(folder) as aside:
            (aside / "weights").write_text(text)
    with pytest.raises(RuntimeError), whole_folder(folder) as aside:
        (aside / "weights").write_text("three")
        raise RuntimeError
    assert (folder / "weights").read_text() == "two" and os.listdir(tmp_path) == ["policy"]
    (folder / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    with whole_folder(tmp_path / "link") as aside:
        (aside / "deeper").mkdir()
        (aside / "deeper" / "weights").write_text("three")
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "deeper" / "weights").read_text() == "three"
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "policy"]
    with pytest.raises(UserError, match="is a file"), whole_folder(folder / "thesis.txt"):
        pass


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write to"):
        write_whole(tmp_path / "file" / "x", "text")


def test_half_a_surrogate_pair_is_written_either_way(run):
    """A service's cause may hold one; the log is appended to, and later cut back as a whole."""
    rows = [{"step": step, "cause": "a\ud800b"} for step in range(2)]
    run.append("rejects.jsonl", rows)
    save(run, 1)
    run.latest()
    assert run.read("rejects.jsonl") == rows[:1]


def test_a_damaged_line_is_named(run):
    append_lines(run.folder / "metrics.jsonl", [{"step": 0}])
    with (run.folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
        run.read("metrics.jsonl")
