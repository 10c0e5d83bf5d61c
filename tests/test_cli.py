"""The commands as a user types them, mistakes included: one sentence, a non-zero code, no traceback, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import save_model

from accord.cli import main
from accord.config import RLSettings, build
from accord.errors import UserError

RL = [
    "--top-layers", "2", "--prompts-per-step", "4", "--completions-per-prompt", "2", "--max-new-tokens", "6",
    "--max-steps", "3", "--dtype", "float32", "--validate-every", "2", "--checkpoint-every", "1",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder: a model, prompts, a one-line reward."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [{"prompt": f"say {w}"} for w in "one two three four five six seven eight nine ten".split()]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def short(prompts, completions): return [-len(c) / 10 for c in completions]\n"
        "def nan(prompts, completions): return [float('nan')] * len(completions)\n"
        "def slow(prompts, completions):\n    time.sleep(0.4)\n    return [0.1 * len(c) for c in completions]\n"
    )
    return tmp_path


def accord(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, " ".join((captured.out + captured.err).split())


def test_rl_evaluate_and_reload(home, capsys):
    code, out = accord(capsys, "rl", "--model", "model", "--prompts", "prompts.jsonl", "--reward", "mine:short", "--out", "runs/a", *RL)
    assert code == 0 and "4 prompts x 2 completions = 8 completions a step" in out
    run = home / "runs" / "a"
    config = (run / "config.yaml").read_text()
    assert "gae_lambda: 0.95" in config and "max_steps: 3" in config  # defaults included
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [-1, 0, 1, 2] and steps[1]["reward/mine:short"] <= 0
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["parts"] == {"mine:short": pytest.approx(-len(rows[0]["completion"]) / 10)}
    assert "<svg" in (run / "report.html").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(run / "policy")
    AutoTokenizer.from_pretrained(run / "policy")
    code, out = accord(
        capsys, "evaluate", "--model", run / "policy", "--against", "model", "--prompts", "prompts.jsonl", "--reward", "mine:short",
        "--out", "runs/e", "--max-new-tokens", "6", "--no-gold",
    )  # fmt: skip
    assert code == 0 and "KL to the reference" in out
    facts = json.loads((home / "runs" / "e" / "evaluation.json").read_text())
    assert facts["before"]["score"]["low"] <= facts["before"]["score"]["value"] <= facts["before"]["score"]["high"]
    assert facts["kl"]["value"] > 0
    code, out = accord(capsys, "explain-objective", "runs/a", "--row", "5", "--json", "x.json")
    assert code == 0 and "loss = -J" in out, out
    assert "log pi_ref" in out
    numbers = json.loads((home / "x.json").read_text())
    assert numbers["step"] == 3 and -sum(numbers["step_terms"].values()) == pytest.approx(numbers["loss"], rel=1e-4, abs=1e-7)
    for arguments, message in ((["runs/a", "--row", "99"], "choose --row 0 to 7"), (["runs/e"], "run of accord evaluate")):
        code, out = accord(capsys, "explain-objective", *arguments)
        assert code == 2 and message in out


def test_sample_goes_on_where_it_stopped(home, capsys):
    arguments = [
        "sample",
        "--model",
        "model",
        "--prompts",
        "prompts.jsonl",
        "--out",
        "c.jsonl",
        "--per-prompt",
        "2",
        "--max-new-tokens",
        "5",
    ]
    assert accord(capsys, *arguments)[0] == 0
    whole = (home / "c.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 20
    (home / "c.jsonl").write_text("".join(lines[:13]) + lines[13][:30])  # cut within a prompt, and within a row
    assert accord(capsys, *arguments)[0] == 0
    assert (home / "c.jsonl").read_text() == whole
    code, out = accord(capsys, *arguments[:-4], "--per-prompt", "3", "--max-new-tokens", "5")
    assert code == 2 and "holds 2 completions of" in out
    code, out = accord(capsys, *arguments, "--temperature", "0.5")
    assert code == 2 and "from another model or with other settings" in out and (home / "c.jsonl").read_text() == whole


def test_reward_from_pairs(home, capsys):
    rows = [{"prompt": f"q{i}", "chosen": f"{i}!", "rejected": f"{i}."} for i in range(30)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out = accord(capsys, "reward", "--model", "model", "--pairs", "pairs.jsonl", "--out", "rm", "--top-layers", "2")
    assert code == 0 and "Held-out accuracy" in out
    code, out = accord(
        capsys,
        "rl",
        "--model",
        "model",
        "--prompts",
        "prompts.jsonl",
        "--reward",
        "0.5*rm",
        "--reward",
        "mine:short",
        "--out",
        "runs/b",
        *RL,
    )
    assert code == 0
    row = json.loads((home / "runs" / "b" / "completions.jsonl").read_text().splitlines()[0])
    assert row["score"] == pytest.approx(0.5 * row["parts"]["rm"] + row["parts"]["mine:short"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rl", "--prompst", "x"], "Unknown option '--prompst'. Did you mean '--prompts'?"),
        (["rll"], "Did you mean 'rl'?"),
        (["rl", "--prompts", "gone.jsonl"], "File gone.jsonl does not exist"),
        (["rl", "--prompts", "broken.jsonl"], "broken.jsonl:2 is not valid JSON"),
        (["rl", "--model", "gone/for/good"], "does not exist"),
        (["rl", "--learning-rate", "fast"], "learning_rate: Input should be a valid number"),
        (["rl", "--max-steps", "0"], "max_steps: Input should be greater than or equal to 1 (it is '0')"),
        (["rl", "--minibatches", "3"], "64 completions do not divide into 3 minibatches"),
        (["rl", "--adaptation", "lorra"], "adaptation: Input should be 'auto', 'split', 'lora' or 'full'"),
        (["rl", "--top-layers", "9"], "this model has 4 layers"),
        (["rl", "--config", "bad.yaml"], "unknown setting 'max_step'. Did you mean 'max_steps'?"),
        (["rl", "--config", "gone.yaml"], "Config file gone.yaml does not exist"),
        (["rl", "--reward", "mine:nan"], "it returned nan; return a finite number, or None to skip"),
        (["rl", "--reward", "mine:gone"], "could not be imported"),
        (["rl", "--prompts-per-step", "40"], "fewer than prompts_per_step (40)"),
        (["rl", "--max-new-tokens", "500"], "exceeds the model's context of 128"),
        (["rl", "--out", "taken"], "already exists"),
        (["rl", "--kl-target", "3", "--kl-coef", "0"], "kl_coef must start above 0"),
        (["demo", "--seed", "-1"], "seed -1: sample.seed: Input should be greater than or equal to 0"),
        (["run", "dmo"], "Did you mean 'demo'?"),
        (["run", "bad-recipe.yaml"], "unknown setting 'rl.max_step'. Did you mean 'max_steps'?"),
        (["resume", "nothing"], "is not a run folder"),
        (["chat", "--model", "gone-model"], "No model 'gone-model'"),
    ],
)
def test_a_mistake_is_one_sentence(home, capsys, arguments, message):
    (home / "broken.jsonl").write_text('{"prompt": "a"}\n{oops\n')
    (home / "bad.yaml").write_text("max_step: 3\n")
    (home / "bad-recipe.yaml").write_text("rl:\n  max_step: 3\n")
    (home / "taken").mkdir()
    (home / "taken" / "file").touch()
    if arguments[0] == "rl" and "--prompst" not in arguments:
        defaults = {"--model": "model", "--prompts": "prompts.jsonl", "--reward": "mine:short", "--out": "runs/x"}
        if not {"--minibatches", "--config", "--max-steps", "--prompts-per-step"} & set(arguments):
            defaults |= {"--prompts-per-step": "4", "--completions-per-prompt": "2", "--top-layers": "2", "--max-steps": "2"}
        elif "--prompts-per-step" in arguments:
            defaults |= {"--top-layers": "2"}
        for flag, value in defaults.items():
            if flag not in arguments:
                arguments = [*arguments, flag, value]
    code, out = accord(capsys, *arguments)
    assert code == 2
    assert message in out, out


def test_a_run_s_settings_are_a_config_and_a_skipping_reward_is_told(home, capsys):
    (home / "mine.py").write_text("def none(p, c): return [None] * len(c)\ndef one(p, c): return [float(len(x)) for x in c]\n")
    rl = ["rl", "--model", "model", "--prompts", "prompts.jsonl"]
    assert accord(capsys, *rl, "--reward", "mine:one", "--out", "a", *RL)[0] == 0
    code, _ = accord(capsys, *rl, "--reward", "mine:one", "--out", "b", "--config", "a/config.yaml", "--max-steps", "1")
    assert code == 0 and "max_new_tokens: 6" in (home / "b" / "config.yaml").read_text()
    code, out = accord(capsys, *rl, "--reward", "mine:none", "--out", "c", *RL)
    assert code == 2 and "the reward skipped every completion" in out
    code, out = accord(capsys, "evaluate", "--model", "model", "--prompts", "prompts.jsonl", "--out", "a")
    assert code == 2 and "already exists. Choose another --out" in out
    (home / "long.jsonl").write_text(json.dumps({"prompt": "x" * 500}) + "\n")
    for words in (["--prompts", "long.jsonl", "--prompts-per-step", "1"], ["--top-layers", "9"], ["--prompts-per-step", "99"]):
        assert accord(capsys, *rl, "--reward", "mine:one", "--out", "d", *words)[0] == 2
        assert not (home / "d").exists(), words


def test_learning_from_a_log(home, capsys):
    """A run's completions, or ranked ones, teach offline; nothing is sampled but for the validation; resumed exactly."""
    common = ["--model", "model", "--out", "runs/a", *RL]
    assert accord(capsys, "rl", "--prompts", "prompts.jsonl", "--reward", "mine:short", *common)[0] == 0
    offline = [
        "rl", "--algorithm", "ilql", "--model", "model", "--completions", "runs/a/completions.jsonl", "--top-layers", "2",
        "--prompts-per-step", "8", "--minibatches", "2", "--dtype", "float32", "--validate-every", "2", "--checkpoint-every", "1",
    ]  # fmt: skip
    code, out = accord(capsys, *offline, "--max-steps", "4", "--out", "runs/b")
    assert code == 0 and "8 logged completions a step" in out
    rows = [json.loads(line) for line in (home / "runs/b/completions.jsonl").read_text().splitlines()]
    logged = {(r["completion"], r["score"]) for r in map(json.loads, (home / "runs/a/completions.jsonl").read_text().splitlines())}
    assert len(rows) == 32 and {(r["completion"], r["score"]) for r in rows} <= logged
    assert all(set(r["parts"]) == {"logged"} for r in rows)
    validated = [*offline, "--validation", "prompts.jsonl", "--reward", "mine:short"]
    assert accord(capsys, *validated, "--max-steps", "2", "--out", "runs/c")[0] == 0
    config = home / "runs/c/config.yaml"
    config.write_text(config.read_text().replace("max_steps: 2", "max_steps: 4"))
    assert accord(capsys, "resume", "runs/c")[0] == 0
    b, c = (
        [{k: v for k, v in json.loads(line).items() if k != "validation_score"} for line in path.read_text().splitlines()]
        for path in (home / "runs/b/metrics.jsonl", home / "runs/c/metrics.jsonl")
    )  # fmt: skip
    assert b == c and any("validation_score" in line for line in (home / "runs/c/metrics.jsonl").read_text().splitlines())
    # Rankings in place of scores: 2 above 3, both above F.
    assert accord(capsys, "sample", "--model", "model", "--prompts", "prompts.jsonl", "--out", "s.jsonl", "--per-prompt", "3")[0] == 0
    (home / "r.jsonl").write_text(
        "".join(json.dumps({"prompt_id": f"row-{i:05d}", "labeler": "me", "ranks": [2, 3, "F"]}) + "\n" for i in range(1, 11))
    )
    ranked = [*offline[:5], "--completions", "s.jsonl", "--rankings", "r.jsonl", *offline[7:]]
    assert accord(capsys, *ranked, "--max-steps", "3", "--out", "runs/d")[0] == 0
    rows = [json.loads(line) for line in (home / "runs/d/completions.jsonl").read_text().splitlines()]
    assert sorted({r["score"] for r in rows}) == [-1, 0, 1]
    assert (
        accord(
            capsys,
            "sample",
            "--model",
            "runs/d/policy",
            "--reference",
            "model",
            "--strength",
            "2",
            "--prompts",
            "prompts.jsonl",
            "--out",
            "t.jsonl",
        )[0]
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--algorithm", "ilql", "--prompts", "prompts.jsonl", "--reward", "mine:short"],
            "ilql learns offline, so it needs logged completions",
        ),
        (["--completions", "good.jsonl"], "ppo learns from its own completions; logged ones are for ilql"),
        (["--algorithm", "ilql", "--rankings", "good.jsonl"], "give them too: --completions"),
        (["--algorithm", "ilql", "--completions", "good.jsonl"], "1 logged completions are fewer than a step takes (64)"),
        (
            ["--algorithm", "ilql", "--completions", "noscore.jsonl"],
            "noscore.jsonl:1 has no field 'score'; give scores, or say with --rankings",
        ),
        (["--algorithm", "ilql", "--completions", "nan.jsonl"], "nan.jsonl:1: field 'score' is 'high'; it must be a finite number"),
        (["--algorithm", "ilql", "--completions", "turns.jsonl"], "turns.jsonl:1: each of its 'turns' needs 'tokens' and 'reply'"),
        (["--algorithm", "ilql", "--completions", "good.jsonl", "--validation", "prompts.jsonl"], "Validation prompts need a reward"),
        (["--algorithm", "ilql", "--completions", "missing.jsonl"], "missing.jsonl"),
        (["--algorithm", "ilql", "--completions", "model"], "model is a folder; give a file"),
        (["--algorithm", "ilql", "--completions", "good.jsonl", "--prompts", "prompts.jsonl"], "leave out --prompts"),
        (["--algorithm", "ilql", "--completions", "good.jsonl", "--reward", "mine:short"], "give validation prompts too"),
    ],
)
def test_a_bad_log_is_one_sentence(home, capsys, arguments, message):
    row = {"id": "p", "prompt": "hi", "completion": "yes", "score": 1.0}
    for name, changed in (("good", row), ("nan", {**row, "score": "high"}), ("turns", {**row, "turns": [{"tokens": []}]})):
        (home / f"{name}.jsonl").write_text(json.dumps(changed) + "\n")
    (home / "noscore.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k != "score"}) + "\n")
    code, out = accord(capsys, "rl", "--model", "model", "--out", "runs/x", *arguments)
    assert code == 2 and message in out and not (home / "runs/x").exists()


def test_a_mistake_leaves_no_run_folder(home, capsys):
    """So that the corrected command can use the same name."""
    common = ["rl", "--model", "model", "--prompts", "prompts.jsonl", "--out", "runs/x", *RL]
    assert accord(capsys, *common, "--reward", "mine:gone")[0] == 2
    assert accord(capsys, *common, "--reward", "mine:short", "--validation", "gone.jsonl")[0] == 2
    assert not (home / "runs" / "x").exists()
    assert accord(capsys, *common, "--reward", "mine:short")[0] == 0


@pytest.mark.parametrize(
    "content", ["", "- a", "command: rl\n", "command: run\n", "{", "command: rl\nmodel: m\nprompts: p\nreward: r\nrl: {x: 1}\n"]
)
def test_a_damaged_config_is_named(home, capsys, content):
    (home / "r").mkdir()
    (home / "r" / "config.yaml").write_text(content)
    code, out = accord(capsys, "resume", "r")
    assert code == 2 and "config.yaml" in out


def test_help_teaches(capsys):
    for command in ("demo", "run", "resume", "sample", "reward", "rl", "evaluate", "chat"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "Example:" in out
    with pytest.raises(SystemExit):
        main(["rl", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--kl-target X Steer kl_coef towards this KL in nats a completion; null: fixed [off]" in out


def test_ctrl_c_saves_and_resume_goes_on_exactly(home):
    """The same metrics and weights as a run that nobody interrupted."""

    def start(*arguments):
        return subprocess.Popen([sys.executable, "-m", "accord", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    common = ["rl", "--model", "model", "--prompts", "prompts.jsonl", "--reward", "mine:slow", *RL, "--max-steps", "6"]
    whole = start(*common, "--out", "whole")
    assert whole.wait() == 0
    process = start(*common, "--out", "cut")
    metrics = home / "cut" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and process.poll() is None and time.monotonic() < limit:
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130 and "accord resume cut" in out and "Traceback" not in out
    resumed = start("resume", "cut")
    assert resumed.wait() == 0, resumed.stdout.read()
    for name in ("policy/model.safetensors", "completions.jsonl"):
        assert (home / "cut" / name).read_bytes() == (home / "whole" / name).read_bytes()


def test_kill_9_loses_at_most_a_step(home):
    arguments = [
        "rl",
        "--model",
        "model",
        "--prompts",
        "prompts.jsonl",
        "--reward",
        "mine:slow",
        *RL,
        "--max-steps",
        "6",
        "--out",
        "killed",
    ]
    process = subprocess.Popen([sys.executable, "-m", "accord", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = home / "killed" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4) and process.poll() is None and time.monotonic() < limit:
        os.sched_yield()
    process.kill()
    process.wait()
    done = subprocess.run([sys.executable, "-m", "accord", "resume", "killed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [-1, 0, 1, 2, 3, 4, 5]


def test_half_a_surrogate_pair_in_settings_is_a_sentence():
    with pytest.raises(UserError, match=r"rl\.yaml holds half of a surrogate pair"):
        build(RLSettings, {"algorithm": "\ud800"}, "rl.yaml")
