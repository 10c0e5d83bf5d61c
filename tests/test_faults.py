"""The fault suite in a short form (the long one: make test-faults; docs/reliability.md)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "faults"


def run(program, *arguments):
    done = subprocess.run([sys.executable, str(HERE / program), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "g++"))), reason="no C compiler, which the failing disk needs")
def test_killed_and_failing_runs_end_as_an_undisturbed_one():
    table = run("campaign.py", "--kills", 6, "--errors", 4, "--others", 0.4, "--seed", 1)
    assert table.count("| none |") == 10, table


def test_damaged_files_are_told_in_a_sentence():
    assert " inputs, 0 failed." in run("fuzz.py", "--each", 40, "--seed", 1)
