"""The tests can fail: every mutant of the maths is noticed (tests/mutants.py; docs/mutants.md is its table)."""

import subprocess
import sys
from pathlib import Path

import mutants


def test_every_third_mutant_is_killed():
    done = subprocess.run([sys.executable, str(Path(mutants.__file__)), "--third"], capture_output=True, text=True)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("killed")) + done.stderr[-2000:]


def test_the_table_is_of_these_mutants():
    table = mutants.TABLE.read_text()
    assert len(mutants.MUTANTS) >= 40
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| `")] == [m[3] for m in mutants.MUTANTS]
