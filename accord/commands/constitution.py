"""Constitutional AI: principles, and feedback by models that judge by them."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accord.commands.options import BUNDLED, MODEL_HELP, PROMPTS_HELP, Command, at_least
from accord.constitution.principles import OURS
from accord.disk import write_lines, write_whole
from accord.errors import UserError
from accord.progress import console, several

if TYPE_CHECKING:
    from accord.constitution.judging import Judge

JUDGE_HELP = f"the judge: {MODEL_HELP}; or the URL of an OpenAI-compatible service, such as https://host/v1 (key in ACCORD_JUDGE_KEY)"
SHOWN = 3  # problems that are printed of many
MADE = {"chains.jsonl", "helpful.jsonl", "examples.jsonl", "chains.html"}
"""What accord constitution revise writes."""


def add(command: Command) -> None:
    """The commands of this family."""
    top = command(
        "constitution", None, "Principles by which a model judges answers, and the feedback that it gives by them.", "accord constitution check mine.yaml"
    )  # fmt: skip
    acts = top.add_subparsers(dest="act", metavar="COMMAND", required=True)

    check = command(
        "check",
        do_check,
        "What is wrong with a constitution, and how often each principle fires on a sample.",
        "accord constitution check mine.yaml --completions completions.jsonl --judge smollm2-135m-instruct",
        under=acts,
    )
    check.add_argument("constitution", nargs="?", default=OURS, help=f"a .yaml or .md file [{OURS}: accord's own]")
    check.add_argument("--completions", metavar="FILE", help="answers to look at: completions of accord sample")
    check.add_argument("--most", type=int, default=50, metavar="N", help="look at the first N of them [50]")
    add_judge(check, required=False)

    red = command(
        "prompts",
        do_prompts,
        "Red-team prompts: wishes that should be declined, and wishes that only sound like it, in many ways to ask.",
        "accord constitution prompts --kind harmful --variants 3 --out red-team.jsonl",
        under=acts,
    )
    red.add_argument(
        "--kind", choices=("harmful", "alarming", "both"), default="both", help="should be declined; only sounds like it; both [both]"
    )
    red.add_argument("--variants", type=int, default=1, metavar="N", help="ways in which each wish is asked [1]")
    red.add_argument("--wishes", metavar="FILE", help="your own: a .yaml file with lists 'ways', 'harmful' and 'alarming' [accord's]")
    red.add_argument("--seed", type=int, default=0, help="which ways are drawn [0]")
    red.add_argument("--out", type=Path, required=True, help="file of prompts to write, new; the kind is their theme")

    revise = command(
        "revise",
        do_revise,
        "A model answers, criticises its answers by principles and rewrites them: examples for accord sft.",
        "accord constitution revise --prompts red-team.jsonl --out revised",
        under=acts,
    )
    revise.add_argument("--prompts", required=True, help=PROMPTS_HELP)
    revise.add_argument(
        "--writer", default=BUNDLED, metavar="MODEL", help=f"who answers, criticises and rewrites: {MODEL_HELP}; or the URL of a service"
    )
    revise.add_argument("--writer-model", metavar="NAME", help="with a service: the model's name there")
    revise.add_argument("--constitution", default=OURS, metavar="FILE", help=f"a .yaml or .md file [{OURS}: accord's own]")
    revise.add_argument("--revisions", type=int, default=2, metavar="N", help="of each answer, each by another principle [2]")
    revise.add_argument(
        "--helpful",
        metavar="FILE",
        help="prompts whose answers are kept as they are, so that the model does not learn to refuse everything",
    )
    revise.add_argument(
        "--shots",
        metavar="FILE",
        help="rows with 'messages': chats put before each request as examples of critiques and revisions; 'accord': its own",
    )
    revise.add_argument("--direct", action="store_true", help="ask for revisions without critiques (of small models they are better so)")
    revise.add_argument("--declined", action="store_true", help="drop last revisions that do not decline a prompt whose theme is 'harmful'")
    revise.add_argument("--attempts", type=int, default=1, metavar="N", help="where a chain is dropped begin another, so often in all [1]")
    revise.add_argument("--principles", metavar="ID,ID", help="revise by these alone [all]")
    revise.add_argument("--temperature", type=float, default=0.7, help="sampling temperature; 0 is greedy [0.7]")
    revise.add_argument("--max-new-tokens", type=int, default=150, metavar="N", help="length limit of each text [150]")
    revise.add_argument("--seed", type=int, default=0, help="luck of the writer, and which principles are drawn [0]")
    add_service(revise)
    revise.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for chains.jsonl, examples.jsonl and chains.html; the same command goes on with one that was cut",
    )

    prefer = command(
        "prefer",
        do_prefer,
        "AI feedback: a judge compares the completions of each prompt by principles, in both orders.",
        "accord constitution prefer --completions completions.jsonl --judge smollm2-135m-instruct --out ai-pairs.jsonl",
        under=acts,
    )
    prefer.add_argument("--completions", metavar="FILE", required=True, help="completions of accord sample, two or more a prompt")
    prefer.add_argument("--constitution", default=OURS, metavar="FILE", help=f"a .yaml or .md file [{OURS}: accord's own]")
    add_judge(prefer, required=True)
    prefer.add_argument("--ensemble", type=int, default=1, metavar="N", help="principles that each prompt's answers are compared by [1]")
    prefer.add_argument(
        "--thinking", action="store_true", help="the judge thinks step by step first; verdicts are then clamped to 0.4 to 0.6, as the paper does"
    )  # fmt: skip
    prefer.add_argument("--clamp", type=float, metavar="C", help="keep probabilities within C and 1 - C [0.4 with --thinking, else off]")
    prefer.add_argument("--seed", type=int, default=0, help="which principles are drawn, and which prompts are the sample [0]")
    prefer.add_argument(
        "--for-people",
        type=Path,
        metavar="FILE",
        help="also write the completions that people should rank, for accord label --completions: of prompts of which the judge is unsure",
    )
    prefer.add_argument(
        "--unsure", type=float, default=0.1, metavar="X", help="unsure: probabilities within X of 0.5, mean over a prompt [0.1]"
    )
    prefer.add_argument(
        "--sample", type=float, default=0.0, metavar="SHARE", help="and a sample of all prompts, to see how far they agree [0]"
    )
    prefer.add_argument(
        "--out", type=Path, required=True, help="file of soft pairs to write, new: for accord reward --pairs, accord prefer --pairs"
    )
    prefer.add_argument(
        "--rankings", type=Path, metavar="FILE", help="also write rankings, for accord agreement and accord label --rankings"
    )


def add_judge(parser: argparse.ArgumentParser, required: bool) -> None:
    rules = "; or 'rules', accord's own, by prompts' themes and the classifier of toxicity" if required else ""
    parser.add_argument("--judge", required=required, help=JUDGE_HELP + rules)
    parser.add_argument("--judge-model", metavar="NAME", help="with a service: the model's name there")
    add_service(parser)


def add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="with a service: requests at once [8]")
    parser.add_argument(
        "--budget", type=int, metavar="TOKENS", help="with a service: stop after so many tokens; what was answered is kept [off]"
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="with a service: of a request [60]")


def do_check(arguments: argparse.Namespace) -> None:
    from accord.constitution.principles import check, read_constitution

    found = check(arguments.constitution)
    if found:
        for problem in found[:-1]:
            console.print(f"  {problem}", soft_wrap=True, markup=False)
        raise UserError(f"{arguments.constitution}: {found[-1]}" + (f" ({len(found)} in all)" if len(found) > 1 else ""))
    constitution = read_constitution(arguments.constitution)
    console.print(
        f"{constitution.label}: {several(len(constitution.principles), 'principle')}, nothing missing.", soft_wrap=True, markup=False
    )
    if bool(arguments.completions) != bool(arguments.judge):
        raise UserError("How often principles fire is seen by a judge on a sample; give both --completions and --judge.")
    if not arguments.completions:
        return
    from rich.table import Table

    from accord.constitution.judging import firing
    from accord.data.sources import read_completions

    at_least(arguments, most=1)
    some = [c for group in read_completions(arguments.completions, with_tokens=False).values() for c in group][: arguments.most]
    shares, trouble = firing(_judge(arguments), some, constitution)
    shown = Table("principle", "weight", "priority", f"fires on, of {several(len(some), 'answer')}")
    for p in constitution.principles:
        shown.add_row(p.id, f"{p.weight:g}", str(p.priority), str(shares.get(p.id, "-")))
    console.print(shown)
    _tell(trouble)


def do_prompts(arguments: argparse.Namespace) -> None:
    from accord.constitution.redteam import KINDS, read_wishes, red_team
    from accord.constitution.rules import HARMFUL

    at_least(arguments, variants=1)
    if arguments.out.exists():
        raise UserError(f"{arguments.out} already exists; choose another name or delete it.")
    told = read_wishes(arguments.wishes)
    wanted = [kind for kind in KINDS if kind in told] if arguments.kind == "both" else [arguments.kind]
    made = [p for kind in wanted for p in red_team(kind, arguments.variants, arguments.seed, arguments.wishes)]
    write_lines(arguments.out, (p.to_json() for p in made))
    use = f"   (use: accord constitution revise --prompts {arguments.out} --out ...)" if wanted == [HARMFUL] else ""
    console.print(f"{several(len(made), 'prompt')} in {arguments.out}{use}", soft_wrap=True, markup=False)


def do_revise(arguments: argparse.Namespace) -> None:
    from accord.api import load
    from accord.constitution.principles import read_constitution
    from accord.constitution.revising import curve, examples, page, revise, shots_of
    from accord.constitution.rules import HARMFUL
    from accord.constitution.writers import writer_of
    from accord.data.sources import read_prompts

    at_least(arguments, revisions=0, max_new_tokens=1, temperature=0, attempts=1)
    if not math.isfinite(arguments.temperature):
        raise UserError(f"--temperature is {arguments.temperature}; it must be a number.")
    constitution = read_constitution(arguments.constitution).only(arguments.principles and arguments.principles.split(","))
    prompts = read_prompts(arguments.prompts)
    helpful = read_prompts(arguments.helpful) if arguments.helpful else []
    critiques = not arguments.direct
    shots = shots_of(arguments.shots, critiques)
    if arguments.declined and not any(p.theme == HARMFUL for p in prompts):
        raise UserError(f"--declined speaks of prompts whose theme is '{HARMFUL}', and {arguments.prompts} has none.")
    if {p.id for p in prompts} & {p.id for p in helpful}:  # such as those of the rows of two files
        helpful = [replace(p, id=f"helpful-{p.id}") for p in helpful]
    if arguments.out.exists() and not (arguments.out.is_dir() and {p.name.removesuffix(".part") for p in arguments.out.iterdir()} <= MADE):
        raise UserError(f"{arguments.out} exists already and is no folder of accord constitution revise; choose another --out.")
    writer = writer_of(
        arguments.writer, arguments.writer_model, load, arguments.temperature, arguments.max_new_tokens, arguments.seed, **_service(arguments)
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    chains = revise(
        arguments.out / "chains.jsonl", writer, prompts, constitution, arguments.revisions, arguments.seed, shots, critiques, arguments.declined, arguments.attempts
    )  # fmt: skip
    plain = revise(arguments.out / "helpful.jsonl", writer, helpful, constitution, 0, arguments.seed) if helpful else []
    rows = [*examples(chains), *examples(plain)]
    write_lines(arguments.out / "examples.jsonl", rows)
    write_whole(arguments.out / "chains.html", page(chains, writer.name, constitution.label))
    for k, (toxic, no) in enumerate(zip(curve(chains), curve(chains, "declines"), strict=True)):
        console.print(f"  after {several(k, 'revision')}: toxic with {toxic}, declines {no}", soft_wrap=True, markup=False)
    _tell([f"'{c.id}': {c.dropped}" for c in (*chains, *plain) if c.dropped], "Dropped")
    console.print(
        f"{several(len(rows), 'example')} in {arguments.out / 'examples.jsonl'}   (use: accord sft --examples {arguments.out / 'examples.jsonl'} --out ...)\n"
        f"Page: {arguments.out / 'chains.html'}", soft_wrap=True, markup=False,
    )  # fmt: skip


def do_prefer(arguments: argparse.Namespace) -> None:
    from accord.constitution.judging import compare, rankings, soft_pairs
    from accord.constitution.principles import read_constitution
    from accord.constitution.routing import for_people
    from accord.constitution.rules import NAME, by_rules
    from accord.data.sources import read_completions
    from accord.feedback.export import group_rows

    at_least(arguments, ensemble=1)
    clamp = arguments.clamp if arguments.clamp is not None else 0.4 if arguments.thinking else None
    if clamp is not None and not 0 <= clamp < 0.5:
        raise UserError(f"--clamp is {clamp:g}; it must be at least 0 and less than 0.5.")
    outputs = [path for path in (arguments.out, arguments.rankings, arguments.for_people) if path is not None]
    for path in outputs:
        if path.exists():
            raise UserError(f"{path} already exists; choose another name or delete it.")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UserError("--out, --rankings and --for-people name the same file twice; give each its own.")
    for name in ("unsure", "sample"):
        if not 0 <= getattr(arguments, name) <= (0.5 if name == "unsure" else 1):
            raise UserError(f"--{name} is {getattr(arguments, name):g}; it must be from 0 to {0.5 if name == 'unsure' else 1}.")
    constitution = read_constitution(arguments.constitution)
    groups = [group for group in read_completions(arguments.completions, with_tokens=False).values() if len(group) > 1]
    if not groups:
        raise UserError(f"{arguments.completions} has no prompt with two completions to compare; sample with --per-prompt 2 or more.")
    if arguments.judge == NAME:
        for name in ("thinking", "clamp", "ensemble"):
            if getattr(arguments, name) not in (None, False, 1):
                raise UserError(
                    f"The rules ask no principle, so --{name} changes nothing of what they say; leave it out, or give another --judge."
                )
        found = by_rules(groups)
    else:
        found = compare(_judge(arguments), groups, constitution, arguments.ensemble, clamp, arguments.thinking, arguments.seed)
    write_lines(
        arguments.out,
        (row | {"judge": found.judge, "rankings": {found.constitution: 1}} for row in group_rows(soft_pairs(groups, found), [])),
    )
    if arguments.rankings:
        write_lines(arguments.rankings, (r.to_json() for r in rankings(groups, found)))
    _tell(found.problems)
    bias = (
        f"; liking for the first position: {found.position_bias} log-odds, cancelled by asking in both orders"
        if arguments.judge != NAME
        else ""
    )
    console.print(f"{several(len(found.compared), 'comparison')} in {arguments.out}{bias}.", soft_wrap=True, markup=False)
    if arguments.for_people:
        routed = for_people(found, groups, arguments.unsure, arguments.sample, arguments.seed).all
        write_lines(arguments.for_people, (c.to_json() for group in groups if group[0].prompt.id in routed for c in group))
        console.print(
            f"{several(len(routed), 'prompt')} for people in {arguments.for_people}   (use: accord label --completions {arguments.for_people})", soft_wrap=True, markup=False,
        )  # fmt: skip


def _judge(arguments: argparse.Namespace) -> Judge:
    from accord.api import load
    from accord.constitution.judges import judge_of
    from accord.constitution.rules import NAME

    if arguments.judge == NAME:
        raise UserError("The rules compare answers and go by no principle; give a model or a service as --judge.")
    return judge_of(arguments.judge, arguments.judge_model, load, **_service(arguments))


def _service(arguments: argparse.Namespace) -> dict[str, Any]:
    at_least(arguments, concurrency=1)
    if arguments.budget is not None:
        at_least(arguments, budget=1)
    if not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise UserError(f"--timeout is {arguments.timeout:g}; it must be a number of seconds above 0.")
    return {"concurrency": arguments.concurrency, "budget": arguments.budget, "timeout": arguments.timeout}


def _tell(problems: list[str], what: str = "Without a usable verdict") -> None:
    if problems:
        console.print(f"[yellow]{what}: {len(problems)}[/], such as:", soft_wrap=True)
        for problem in problems[:SHOWN]:
            console.print(f"  {problem}", soft_wrap=True, markup=False)
