"""The run folder: whole checkpoints, one writer, repaired logs."""

import json
import os
import subprocess
import sys

import pytest
import torch

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
    assert [step for step, _, _ in run.checkpoints()] == [2, 4, 5]
    saved = run.latest()
    assert saved.step == 5 and saved.tensors["x"].tolist() == [5, 5, 5] and saved.about == {"kl": {"coef": 5}}


@pytest.mark.parametrize("where", [0, 0.3, 0.6, 0.999])
def test_a_flipped_byte_is_seen_and_the_one_before_is_used(run, where):
    save(run, 1)
    save(run, 2)
    file = run.folder / "checkpoints" / "step-2" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 1
    file.write_bytes(data)
    assert run.latest().step == 1


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
    run._lock.close()
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
    run._lock.close()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "told: Cannot write to" in done.stdout and "accord resume" in done.stdout, done.stdout + done.stderr
    assert "['step-1']" in done.stdout


def test_one_writer(run):
    with pytest.raises(UserError, match="in use by another"):
        Run.open(run.folder)
    run._lock.close()
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

    monkeypatch.setattr("accord.runs.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*accord resume"):
        save(run, 2)
    assert os.listdir(run.folder / "checkpoints") == ["step-1"]
    assert run.latest().step == 1


def test_newer_formats_are_refused_with_the_version_that_reads_them(run):
    save(run, 1)
    path = run.folder / "checkpoints" / "step-1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99, "accord": "9.9"}))
    with pytest.raises(UserError, match=r"format 99, written by accord 9\.9"):
        run.latest()
