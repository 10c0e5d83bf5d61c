"""Looking at models: measured, compared, explained, talked with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from accord.commands.options import BUNDLED, MODEL_HELP, TEXT_HELP, Command, add_model, at_least, settings
from accord.config import EvaluationSettings
from accord.disk import write_whole
from accord.errors import UserError
from accord.progress import console, several


def add(command: Command) -> None:
    """The commands of this family."""
    evaluate = command(
        "evaluate",
        do_evaluate,
        "Compare an aligned model with a reference on held-out prompts.",
        "accord evaluate --model runs/brief/policy --prompts held.jsonl --out runs/brief-eval",
        EvaluationSettings,
    )
    evaluate.add_argument("--model", required=True, help="the aligned model; " + MODEL_HELP)
    evaluate.add_argument("--against", default=BUNDLED, help="the reference; " + MODEL_HELP)
    evaluate.add_argument("--prompts", required=True, help="held-out prompts")
    evaluate.add_argument("--reward", action="append", metavar="[WEIGHT*]SPEC", help="also report this reward")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for the report, new")

    explained = command(
        "explain-objective",
        do_explain,
        "The objective of one completion of a run, token by token, and how its terms add up to the loss.",
        "accord explain-objective runs/demo --row 3",
    )
    explained.add_argument("run", type=Path, help="run folder of accord rl, demo or run; the step after its newest checkpoint is played")
    explained.add_argument("--row", type=int, default=0, help="which of the step's completions [0]")
    explained.add_argument("--json", type=Path, metavar="FILE", help="also write all the numbers")

    inside = command(
        "look-inside",
        do_look_inside,
        "A page that shows what each layer of a model does to a text: tokens, embeddings, attention, residual stream, next tokens.",
        'accord look-inside smollm2-135m-instruct "The cat sat on the mat because it was tired"',
    )
    inside.add_argument("model", help=MODEL_HELP)
    inside.add_argument("text", help="a sentence or two; a page holds 128 tokens")
    inside.add_argument("--chat", action="store_true", help="the text is what a user says; the model's template is put around it")
    inside.add_argument("--out", type=Path, default=Path("inside.html"), help="page to write [inside.html]")
    inside.add_argument("--json", type=Path, metavar="FILE", help="also write all the numbers")

    two = command(
        "compare",
        do_compare,
        "Two models on the same text: perplexity, agreement on the next token, KL by place, and what each writes.",
        "accord compare smollm2-135m-instruct runs/brief/policy --text held.txt --out compared.html",
    )
    two.add_argument("a", help=MODEL_HELP)
    two.add_argument("b", help="the other model")
    two.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="FILE",
        help=TEXT_HELP,
    )
    two.add_argument("--most", type=int, metavar="N", help="take the first N documents of each of --text [all]")
    two.add_argument("--window", type=int, default=512, metavar="N", help="tokens read at once; each window begins anew [512]")
    two.add_argument("--samples", type=int, default=4, metavar="N", help="documents whose beginnings both continue [4]")
    two.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length limit of these [64]")
    two.add_argument("--seed", type=int, default=0, help="luck of these [0]")
    two.add_argument("--out", type=Path, default=Path("compared.html"), help="page to write [compared.html]")
    two.add_argument("--json", type=Path, metavar="FILE", help="also write all the numbers")

    game = command(
        "play", do_play, "Let a model play an environment's episodes.", "accord play --model runs/ttt/policy --environment tictactoe"
    )
    game.add_argument("--model", required=True, help=MODEL_HELP + "; or scratch")
    game.add_argument("--environment", required=True, help="its name, or module:Class")
    game.add_argument("--episodes", type=int, default=1000, help="how many [1000]")
    game.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy [0]")
    game.add_argument("--seed", type=int, default=0, help="luck of both sides [0]")
    game.add_argument("--show", type=int, default=3, metavar="N", help="print the first N episodes [3]")

    chat = command("chat", do_chat, "Talk with a model in the terminal.", "accord chat --model runs/demo/policy")
    add_model(chat)
    chat.add_argument("--temperature", type=float, default=0.7, help="sampling temperature; 0 is greedy [0.7]")
    chat.add_argument("--max-new-tokens", type=int, default=200, help="length limit of an answer [200]")


def do_evaluate(arguments: argparse.Namespace) -> None:
    from accord.api import evaluate, load
    from accord.data.sources import read_prompts
    from accord.evaluation.report import write_report
    from accord.evaluation.summary import print_comparison
    from accord.pipeline import save_comparison
    from accord.runs import Run, refuse_existing

    values = settings(arguments, EvaluationSettings)
    prompts = read_prompts(arguments.prompts)
    config = {
        "command": "evaluate",
        "model": arguments.model,
        "against": arguments.against,
        "prompts": arguments.prompts,
        "evaluation": values,
    }
    refuse_existing(arguments.out, resumable=False)
    comparison = evaluate(load(arguments.model), load(arguments.against), prompts, arguments.reward, **values)
    run = Run.create(arguments.out, config)
    save_comparison(run.folder, comparison)
    print_comparison(comparison.to_json())
    console.print(f"Report: {write_report(run.folder)}", soft_wrap=True)


def do_explain(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from accord.evaluation.summary import print_explained
    from accord.pipeline import explain_run

    explained = explain_run(arguments.run, arguments.row)
    print_explained(explained)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(explained), indent=1, ensure_ascii=False))


def do_look_inside(arguments: argparse.Namespace) -> None:
    from accord.api import load
    from accord.inside.page import as_json, as_page
    from accord.inside.trace import trace

    _refuse_page(arguments.out, "<title>Inside ")
    found = trace(load(arguments.model), arguments.text, arguments.chat)
    write_whole(arguments.out, as_page(found))
    if arguments.json:
        write_whole(arguments.json, as_json(found))
    best = found.logits[-1].softmax(-1).topk(min(5, found.logits.shape[1]))
    told = ", ".join(
        f"{found.policy.tokenizer.inner.decode([i])!r} {p:.1%}" for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    console.print(f"{several(len(found.ids), 'token')}; what comes next: {told}\nPage: {arguments.out}", soft_wrap=True, markup=False)


def do_compare(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from accord.api import load
    from accord.data.sources import read_texts
    from accord.inside.comparison import as_json, compare, page, table

    at_least(arguments, window=2, samples=0, max_new_tokens=1)
    _refuse_page(arguments.out, "<title>accord compare: ")
    texts = read_texts(arguments.text, arguments.most)
    found = compare(
        load(arguments.a), load(arguments.b), texts, arguments.window, arguments.samples, arguments.max_new_tokens, arguments.seed
    )
    write_whole(arguments.out, page(found))
    if arguments.json:
        write_whole(arguments.json, as_json(found))
    shown = Table("", arguments.a, arguments.b)
    for row in table(found):
        shown.add_row(*row)
    console.print(shown)
    if found.agreement is not None:
        console.print(f"The same likeliest next token: {found.agreement}", soft_wrap=True)
    console.print(f"Page: {arguments.out}", soft_wrap=True, markup=False)


def _refuse_page(path: Path, mark: str) -> None:
    """Write only over a page that this command wrote."""
    if path.exists() and (not path.is_file() or mark not in path.read_text(errors="replace")[:1000]):
        raise UserError(f"{path} exists already and is no such page; choose another --out.")


def do_play(arguments: argparse.Namespace) -> None:
    from collections import Counter

    from accord.api import load_start, play_episodes
    from accord.data.statistics import bootstrap_ratio
    from accord.rollout.environments import make_environment

    at_least(arguments, episodes=1)
    world = make_environment(arguments.environment)
    policy = load_start(arguments.model, "auto", world)
    rollout = play_episodes(policy, world, arguments.episodes, arguments.temperature, arguments.seed)
    assert rollout.step_rewards is not None
    totals = rollout.step_rewards.sum(-1).tolist()
    for row in range(min(arguments.show, len(rollout))):
        console.print(
            f"  {rollout.prompts[row].text} | {rollout.texts[row]}   {totals[row]:g}", soft_wrap=True, highlight=False, markup=False
        )
    shares = ", ".join(f"{value:g} in {count / len(totals):.1%}" for value, count in sorted(Counter(totals).items(), reverse=True)[:8])
    mean = bootstrap_ratio(totals, [1.0] * len(totals), [str(i) for i in range(len(totals))])
    console.print(f"{len(totals)} episodes of {world.name}: mean reward {mean}; reward {shares}", soft_wrap=True, highlight=False)


def do_chat(arguments: argparse.Namespace) -> None:
    from accord.api import load
    from accord.data.records import Prompt
    from accord.rollout.engine import Engine
    from accord.rollout.sampling import Sampling

    policy = load(arguments.model)
    engine, messages = Engine(policy, rows=1), list[dict[str, str]]()
    console.print("[dim]An empty line or Ctrl-D ends the chat.[/]")
    while text := _ask():
        messages.append({"role": "user", "content": text})
        content: Any = messages if policy.tokenizer.has_chat_template else text
        sampling = Sampling(arguments.temperature, max_new_tokens=arguments.max_new_tokens, seed=len(messages))
        answer = engine.sample([Prompt(f"turn-{len(messages)}", content)], 1, sampling).texts[0]
        console.print(answer, markup=False, style="cyan")
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
