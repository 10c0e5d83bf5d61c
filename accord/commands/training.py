"""Everything that trains."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from accord.commands.options import PROMPTS_HELP, TEXT_HELP, TUNED_HELP, Command, add_model, add_preferences, preferences, settings
from accord.config import RewardSettings, RLSettings
from accord.errors import UserError
from accord.feedback.given import Given
from accord.pretraining.settings import PretrainSettings
from accord.progress import console, several
from accord.supervised.settings import PreferenceSettings, SFTSettings

if TYPE_CHECKING:
    from accord.supervised.training import Tuned


def add(command: Command) -> None:
    """The commands of this family."""
    tokenizer = command(
        "tokenizer",
        do_tokenizer,
        "A tokenizer of your own, learned from texts.",
        "accord tokenizer --text stories.txt --size 4096 --out my-tokenizer",
    )
    tokenizer.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="FILE",
        help=".txt or .md files, a folder of them, or rows with a field 'text'; repeat",
    )
    tokenizer.add_argument(
        "--kind", choices=("bpe", "char"), default="bpe",
        help="bpe: the pairs of bytes that stand together most often become tokens, and everything can be read; char: a token a character [bpe]",
    )  # fmt: skip
    tokenizer.add_argument("--size", type=int, metavar="N", help="tokens in all, with --kind bpe [4096]")
    tokenizer.add_argument("--validation", metavar="FILE", help="text that is not learned from, to measure on [--text itself]")
    tokenizer.add_argument("--out", type=Path, required=True, help="folder to write, new; transformers opens it")

    pretrain = command(
        "pretrain",
        do_pretrain,
        "Train a language model from nothing, on texts.",
        "accord pretrain --tokenizer my-tokenizer --text stories.jsonl --size 5m --out runs/mine",
        PretrainSettings,
    )
    pretrain.add_argument("--tokenizer", help="folder of one (accord tokenizer makes it), or of a model")
    pretrain.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help=TEXT_HELP,
    )
    pretrain.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="FILE",
        help="texts that are measured on and not learned from [a twentieth at most of --text]",
    )
    pretrain.add_argument("--most", type=int, metavar="N", help="take the first N documents of each of --text [all]")
    pretrain.add_argument("--sizes", action="store_true", help="print what each size needs and end")
    pretrain.add_argument("--out", type=Path, help=TUNED_HELP)

    sft = command(
        "sft",
        do_sft,
        "Supervised fine-tuning: teach a model to answer as examples do.",
        "accord sft --examples chats.jsonl --out runs/taught",
        SFTSettings,
    )
    add_model(sft)
    sft.add_argument(
        "--examples",
        required=True,
        help="rows with 'messages' that end with the assistant's, or 'prompt' and 'completion': .jsonl, .json, .parquet, .csv or hf:ORG/NAME",
    )
    sft.add_argument("--validation", help="examples that are measured on and not learned from [a tenth of --examples]")
    sft.add_argument("--out", type=Path, required=True, help=TUNED_HELP)

    reward = command(
        "reward",
        do_reward,
        "Train a reward model on preference pairs or on rankings.",
        "accord reward --pairs pairs.jsonl --out my-reward",
        RewardSettings,
    )
    add_model(reward, "{}; the reward model shares its trunk")
    add_preferences(reward)
    reward.add_argument("--heldout", type=float, default=0.15, metavar="X", help="share of the prompts held out to measure on [0.15]")
    reward.add_argument(
        "--out", type=Path, required=True, help="folder to save the reward model in; the same command goes on with a training that was cut"
    )

    prefer = command(
        "prefer",
        do_prefer,
        "Learn from preferences without reinforcement learning: DPO, IPO, KTO, ORPO or SimPO.",
        "accord prefer --pairs pairs.jsonl --out runs/preferred",
        PreferenceSettings,
    )
    add_model(prefer, "{}; also the reference")
    add_preferences(prefer)
    prefer.add_argument(
        "--validation", metavar="FILE", help="pairs that are measured on and not learned from [those of a tenth of the prompts]"
    )
    prefer.add_argument("--out", type=Path, required=True, help=TUNED_HELP)

    rl = command(
        "rl",
        do_rl,
        "Align a model with a reward: a reward model, a function over texts, a classifier, or a weighted list.",
        "accord rl --prompts my.jsonl --reward my_rewards:brevity --out runs/brief",
        RLSettings,
    )
    add_model(rl)
    rl.add_argument("--prompts", help=PROMPTS_HELP)
    rl.add_argument(
        "--environment",
        help="where episodes come from instead of prompts, with their reward: tictactoe, tictactoe-perfect, tictactoe-mixed, "
        "arithmetic, or module:Class; --model scratch is a small random model for it",
    )
    rl.add_argument(
        "--reward",
        action="append",
        metavar="[WEIGHT*]SPEC",
        help="FOLDER of a reward model, package.module:function, classifier:NAME[@LABEL], or http(s)://... of a service; "
        "repeat for a weighted list",
    )
    rl.add_argument(
        "--completions",
        help="what an offline algorithm (ilql) learns from: completions with a score each, such as a run's completions.jsonl; "
        "--reward is then for the validation only",
    )
    rl.add_argument("--rankings", help="instead of scores: raw rankings of --completions (from accord sample)")
    rl.add_argument("--validation", help="prompts for the validation score [a tenth of --prompts]")
    rl.add_argument("--out", type=Path, required=True, help="run folder")


def do_tokenizer(arguments: argparse.Namespace) -> None:
    from accord.data.sources import read_texts
    from accord.disk import whole_folder
    from accord.text.vocabulary import learn_tokenizer, statistics

    if arguments.out.exists():
        raise UserError(f"{arguments.out} already exists; choose another --out or delete it.")
    texts = read_texts(arguments.text)
    held = read_texts([arguments.validation]) if arguments.validation else texts
    learned = learn_tokenizer(texts, arguments.kind, arguments.size)
    found = statistics(learned, held)
    with whole_folder(arguments.out) as aside:
        learned.save_pretrained(str(aside))
        (aside / "statistics.json").write_text(json.dumps(found._asdict(), indent=1) + "\n")
    of = "the validation text" if arguments.validation else "the text itself"
    console.print(
        f"{len(learned)} tokens in {arguments.out}. Of {of}: {found.bytes_per_token:.2f} bytes a token, {found.coverage:.2%} of the characters can be told, "
        f"{found.used:.1%} of the vocabulary occurs.",
        soft_wrap=True,
    )


def do_pretrain(arguments: argparse.Namespace) -> None:
    if arguments.sizes:
        from rich.table import Table

        from accord.pretraining.sizes import table

        values = settings(arguments, PretrainSettings)
        shown = Table(
            "size",
            "shape",
            "weights",
            "memory, AdamW",
            "compute a token",
            "learning rate",
            title=f"With a vocabulary of 4096, context {values['context']}",
        )
        for row in table(4096, values["context"]):
            shown.add_row(*row)
        console.print(shown)
        return
    for name in ("tokenizer", "text", "out"):
        if not getattr(arguments, name):
            raise UserError(f"accord pretrain needs --{name}. See: accord pretrain --help")
    _tune(arguments, PretrainSettings, ("tokenizer", "text", "validation", "most"))


def do_sft(arguments: argparse.Namespace) -> None:
    _tune(arguments, SFTSettings, ("model", "examples", "validation"))


def do_prefer(arguments: argparse.Namespace) -> None:
    preferences(arguments).check()
    _tune(arguments, PreferenceSettings, ("model", *Given._fields, "validation"))


def _tune(arguments: argparse.Namespace, kind: type[BaseModel], sources: Sequence[str]) -> None:
    from accord.runs import Run, refuse_existing
    from accord.tuning import finish, prepare

    command = arguments.command
    config = {
        "command": command,
        **{name: getattr(arguments, name) for name in sources},
        command: settings(arguments, kind),
    }
    refuse_existing(arguments.out)
    prepared = prepare(config, f"accord {command}", planned=True)
    after_tuning(arguments.out, command, finish(Run.create(arguments.out, config), prepared))


MEASURES = {
    "loss": "Held-out loss {}",
    "bits_per_byte": "Bits a byte {}",
    "accuracy": "Held-out pairs told apart by the implicit reward: {}",
}


def after_tuning(folder: Path, command: str, tuned: Tuned) -> None:
    for name, text in MEASURES.items():
        if name in tuned.after:
            before = f"{tuned.before[name]:.3f} -> " if name in tuned.before else ""
            console.print(text.format(f"{before}{tuned.after[name]:.3f}") + ".", soft_wrap=True)
    if not tuned.after:
        console.print("[yellow]Nothing was held out to measure on: too few for a tenth, by id. Give --validation.[/]", soft_wrap=True)
    use = f'accord look-inside {folder / "policy"} "Once"' if command == "pretrain" else f"accord chat --model {folder / 'policy'}"
    console.print(f"Report: {folder / 'report.html'}\nModel:  {folder / 'policy'}   (try: {use})", soft_wrap=True)


def do_reward(arguments: argparse.Namespace) -> None:
    from accord.api import announce, load, plan_reward_run, refuse_reward, train_reward

    values = settings(arguments, RewardSettings)
    refuse_reward(arguments.out)
    groups = preferences(arguments).groups(values["fail_weight"])
    announce(None, plan_reward_run(arguments.model, groups, arguments.heldout, RewardSettings(**values)))
    _, report = train_reward(load(arguments.model), groups, heldout=arguments.heldout, out=arguments.out, **values)
    console.print(
        f"Held-out accuracy {report.accuracy} on {several(report.heldout_pairs, 'pair')}; calibration error {report.calibration_error:.3f}.",
        soft_wrap=True,
    )
    if report.heldout_groups == 1:
        console.print("[yellow]A single prompt is held out, so these intervals say nothing; rank more prompts.[/]")
    length = f"longer completions are preferred with a slope of {report.length_slope:.2f} (log-odds per log of the lengths' ratio)"
    if report.follows_length is not None:
        length += f", and the longer one scores higher in {report.follows_length} of held-out pairs"
    console.print(f"Length: {length}.", soft_wrap=True)
    if report.ties is not None:
        console.print(f"Ties: {report.ties['predicted']:.1%} of held-out comparisons expected, {report.ties['share']:.1%} there; threshold {report.ties['threshold']:.3g}.", soft_wrap=True)  # fmt: skip
    console.print(
        f"Reward model in {arguments.out}, its numbers in {arguments.out / 'report.json'}   (use: accord rl --reward {arguments.out} ...)",
        soft_wrap=True,
    )


def do_rl(arguments: argparse.Namespace) -> None:
    from accord.api import finish_rl, prepare_rl
    from accord.runs import Run, refuse_existing

    config = {
        "command": "rl",
        "model": arguments.model,
        "prompts": arguments.prompts,
        "environment": arguments.environment,
        "completions": arguments.completions,
        "rankings": arguments.rankings,
        "validation": arguments.validation,
        "reward": arguments.reward,
        "rl": settings(arguments, RLSettings),
    }
    if arguments.environment is None and arguments.completions is None and arguments.rankings is None:
        for name in ("prompts", "reward"):
            if config[name] is None:
                raise UserError(
                    f"accord rl needs --{name} (or --environment, which brings prompts and a reward; or, offline, --completions). See accord rl --help."
                )
    refuse_existing(arguments.out)
    prepared = prepare_rl(config, "accord rl", planned=True)
    config["rl"] = prepared.settings.model_dump()  # as they are used
    finish_rl(Run.create(arguments.out, config), prepared)
    after_rl(arguments.out, config["environment"])


def after_rl(folder: Path, environment: str | None) -> None:
    use = (
        f"accord play --model {folder / 'policy'} --environment {environment}"
        if environment
        else f"accord chat --model {folder / 'policy'}"
    )
    console.print(f"Report: {folder / 'report.html'}\nModel:  {folder / 'policy'}   (try: {use})", soft_wrap=True)
