"""The command line: one subcommand a stage, each a call of :mod:`accord.api`."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel

from accord import __version__
from accord.config import (
    EvaluationSettings,
    Recipe,
    RewardSettings,
    RLSettings,
    SampleSettings,
    add_options,
    build,
    given,
    load_yaml,
    recipe_text,
)
from accord.disk import read_text, write_whole
from accord.errors import Interrupted, UserError, did_you_mean, needs
from accord.feedback.given import Given, opened
from accord.feedback.settings import QueueSettings
from accord.pretraining.settings import PretrainSettings
from accord.progress import console, orderly_stop, several
from accord.supervised.settings import PreferenceSettings, SFTSettings

if TYPE_CHECKING:
    from accord.supervised.training import Tuned

BUNDLED = "smollm2-135m-instruct"
MODEL_HELP = f"the bundled model ({BUNDLED}), a local Hugging Face folder, or a Hugging Face id"


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See: {self.prog} --help")


def check_words(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], words: Sequence[str]) -> None:
    """Refuse an unknown command or option before anything else, with the one that was meant."""
    if not words or words[0].startswith("-"):
        return
    if words[0] not in commands:
        raise UserError(f"Unknown command '{words[0]}'.{did_you_mean(words[0], commands)} Commands: {', '.join(commands)}.")
    known = [option for action in commands[words[0]]._actions for option in action.option_strings]
    for word in words[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            raise UserError(f"Unknown option '{name}'.{did_you_mean(name, known)} See: {parser.prog} {words[0]} --help")


def add_ranked(parser: argparse.ArgumentParser) -> None:
    """What :class:`Given` reads, ``--pairs`` aside."""
    parser.add_argument("--completions", metavar="FILE", help="completions that --rankings speak of (from accord sample)")
    parser.add_argument("--rankings", metavar="FILE", help="raw rankings: prompt_id, labeler, ranks")
    parser.add_argument("--store", metavar="FILE", help="instead of both: the label store of accord label, a file or a PostgreSQL URL")
    parser.add_argument(
        "--labeler-weights", metavar="FILE", help="JSON: what each labeler's rankings count for (accord agreement --weights)"
    )


def preferences(arguments: argparse.Namespace) -> Given:
    """The options that :func:`add_ranked` adds, and ``--pairs``."""
    return Given(*(getattr(arguments, name, None) for name in Given._fields))


def make_parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    parser = Parser(prog="accord", description="Bring a language model into accord with what people want.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"accord {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str, example: str, *kinds: type[BaseModel]) -> Parser:
        sub: Parser = commands.add_parser(
            name, help=text, description=text, epilog=f"Example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(function=function)
        if kinds:
            sub.add_argument("--config", metavar="FILE", help="YAML file of the settings below; options on the command line win")
        for kind in kinds:
            add_options(sub.add_argument_group("settings"), kind)  # type: ignore[arg-type]
        return sub

    demo = command("demo", do_demo, "The whole of RLHF with the bundled model, in one run with a report.", "accord demo --seed 1")
    demo.add_argument("--seed", type=int, default=0, help="luck of every stage [0]")
    demo.add_argument("--out", type=Path, help="run folder [runs/demo, or runs/demo-seed-N]")

    run = command(
        "run",
        do_run,
        "All stages of a recipe: completions, feedback, reward model, PPO, evaluation, report.",
        "accord run my-recipe.yaml --out runs/mine",
    )
    run.add_argument("recipe", help="a shipped recipe (demo) or a YAML file; start from: accord run demo --show")
    run.add_argument("--out", type=Path, help="run folder [runs/RECIPE]")
    run.add_argument("--seed", type=int, help="luck of every stage [the recipe's]")
    run.add_argument("--labelers", choices=("simulated", "web"), help="who ranks: simulated labelers, or people on a page [the recipe's]")
    run.add_argument("--show", action="store_true", help="print the recipe with all its settings and stop")

    plan = command(
        "plan",
        do_plan,
        "What a run would need here: memory by part, tokens and time by stage. No weight is read; the pace is measured for some seconds.",
        "accord plan demo",
    )
    plan.add_argument("config", help="a recipe (demo, or a YAML file), a run folder's config.yaml, or a YAML file of accord rl's settings")
    plan.add_argument("--model", default=BUNDLED, help="with settings of accord rl: " + MODEL_HELP)
    plan.add_argument("--prompts", help="with settings of accord rl: its prompts")
    plan.add_argument("--reward", action="append", metavar="[WEIGHT*]SPEC", help="with settings of accord rl: its reward, if it is a model")

    resume = command("resume", do_resume, "Go on with a run that was stopped, from the last thing it finished.", "accord resume runs/demo")
    resume.add_argument("run", type=Path, help="run folder")
    resume.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on although settings in config.yaml, or files it names, are not those the run was started with; history.jsonl says so",
    )

    sample = command(
        "sample",
        do_sample,
        "K completions of each prompt, as JSONL.",
        "accord sample --prompts my.jsonl --per-prompt 4 --out completions.jsonl",
        SampleSettings,
    )
    sample.add_argument("--model", default=BUNDLED, help=MODEL_HELP)
    sample.add_argument("--prompts", required=True, help="prompts: .jsonl, .json, .parquet, .txt or hf:ORG/NAME")
    sample.add_argument(
        "--reference", help="decode from this model moved by --strength towards --model and beyond (see docs/algorithms.md, ilql)"
    )
    sample.add_argument("--out", type=Path, required=True, help="file to write; if it exists, sampling goes on after it")

    reward = command(
        "reward",
        do_reward,
        "Train a reward model on preference pairs or on rankings.",
        "accord reward --pairs pairs.jsonl --out my-reward",
        RewardSettings,
    )
    reward.add_argument("--model", default=BUNDLED, help=MODEL_HELP + "; the reward model shares its trunk")
    reward.add_argument("--pairs", help="file or dataset with prompt, chosen, rejected")
    add_ranked(reward)
    reward.add_argument("--heldout", type=float, default=0.15, metavar="X", help="share of the prompts held out to measure on [0.15]")
    reward.add_argument(
        "--out", type=Path, required=True, help="folder to save the reward model in; the same command goes on with a training that was cut"
    )

    label = command(
        "label",
        do_label,
        "Pages on which people rank completions: alone on this machine, or with accounts for a team.",
        "accord label --completions completions.jsonl",
        QueueSettings,
    )
    label.add_argument("--store", default="labels.db", help="where labels are kept: a file, or postgresql://... [labels.db]")
    label.add_argument(
        "--completions", metavar="FILE", action="append", default=[],
        help="completions to rank, from accord sample, or .jsonl, .parquet, .csv, hf:ORG/NAME with id, prompt, completion; repeat for more",
    )  # fmt: skip
    label.add_argument("--gold", metavar="FILE", help="rankings of some of --completions that are known to be right; mixed in unseen")
    label.add_argument(
        "--calibration",
        metavar="FILE",
        help="rankings of some of them that are known to be right; everybody begins with these, and sees the known ranks after each",
    )
    label.add_argument(
        "--rankings", metavar="FILE", help="rankings that people gave elsewhere, such as an export's; kept under their names"
    )
    label.add_argument("--criterion", metavar="FILE", help="Markdown that tells labelers how to rank [the store's; at first accord's own]")
    label.add_argument(
        "--priority", metavar="FOLDER", action="append", default=[],
        help="reward model; prompts on which it is undecided come first. Repeat, and where they disagree counts too [by chance]",
    )  # fmt: skip
    label.add_argument("--model", default=BUNDLED, help="what the overview's reward models are trained from; " + MODEL_HELP)
    label.add_argument("--rewards", type=Path, metavar="FOLDER", help="where these are kept [STORE.rewards]")
    label.add_argument(
        "--retrain-every", type=int, default=0, metavar="N", help="train one after every N rankings; 0: when the owner asks [0]"
    )
    label.add_argument("--accounts", action="store_true", help="people come by invitation and log in")
    label.add_argument(
        "--new-password",
        metavar="NAME",
        help="print a link by which somebody who has forgotten theirs chooses another, and end; the server may be running",
    )
    label.add_argument("--host", default="127.0.0.1", help="address to listen at; one that others can reach needs --accounts [127.0.0.1]")
    label.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one [8000]")
    label.add_argument("--requests", type=int, default=3000, metavar="N", help="requests a minute that one address may make [3000]")
    label.add_argument("--https", action="store_true", help="a proxy in front speaks TLS (docs/labeling.md)")
    label.add_argument(
        "--name",
        metavar="HOST",
        action="append",
        default=[],
        help="a host name that browsers may use; repeat for more [any, with --accounts]",
    )

    backup = command(
        "backup",
        do_backup,
        "A label store in one file, also while people label.",
        "accord backup --store labels.db --out labels-backup.zip",
    )
    backup.add_argument("--store", default="labels.db", help="the label store, a file or a PostgreSQL URL [labels.db]")
    backup.add_argument("--out", type=Path, required=True, help="file to write; new")

    back = command(
        "restore",
        do_restore,
        "A label store from a backup; also the way from SQLite to PostgreSQL and back.",
        "accord restore labels-backup.zip --store postgresql://me@host/labels",
    )
    back.add_argument("backup", type=Path, help="what accord backup wrote")
    back.add_argument("--store", required=True, help="a new file, or an empty PostgreSQL database")

    agree = command(
        "agreement",
        do_agreement,
        "How far labelers agree, with each other and with known answers, and how much each is worth.",
        "accord agreement --rankings rankings.jsonl --weights weights.json",
    )
    agree.add_argument("--rankings", metavar="FILE", help="raw rankings: prompt_id, labeler, ranks")
    agree.add_argument("--store", metavar="FILE", help="instead: the label store of accord label, a file or a PostgreSQL URL")
    agree.add_argument("--gold", metavar="LABELER", help="the labeler whose rankings are known to be right")
    agree.add_argument("--weights", type=Path, metavar="FILE", help="also write what each labeler should count for, for accord reward")
    agree.add_argument("--json", type=Path, metavar="FILE", help="also write all the numbers")

    out = command(
        "export",
        do_export,
        "Rankings and their completions as training data that others read too.",
        "accord export --completions sampled.jsonl --rankings rankings.jsonl --as dataset --out my-preferences",
    )
    add_ranked(out)
    out.add_argument(
        "--as",
        dest="kind",
        choices=("groups", "pairs", "unpaired", "dataset", "rankings", "completions"),
        default="pairs",
        help="groups: a prompt a row, with ties and fails; pairs: prompt, chosen, rejected (TRL); unpaired: prompt, completion, label (KTO); "
        "dataset: a folder for datasets.load_dataset, with a card; rankings, completions: as they are, to bring into another store [pairs]",
    )
    out.add_argument(
        "--fail-weight", type=float, default=1.0, metavar="X", help="weight of pairs of a ranked completion against one marked F [1]"
    )
    out.add_argument("--out", type=Path, required=True, help="file, or with --as dataset the folder, to write; new")

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
        help="documents: .txt or .md files, a folder of them, rows with a field 'text', hf:ORG/NAME, which is streamed; repeat",
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
    pretrain.add_argument("--out", type=Path, help="run folder; the model is in its policy/")

    sft = command(
        "sft",
        do_sft,
        "Supervised fine-tuning: teach a model to answer as examples do.",
        "accord sft --examples chats.jsonl --out runs/taught",
        SFTSettings,
    )
    sft.add_argument("--model", default=BUNDLED, help=MODEL_HELP)
    sft.add_argument(
        "--examples",
        required=True,
        help="rows with 'messages' that end with the assistant's, or 'prompt' and 'completion': .jsonl, .json, .parquet, .csv or hf:ORG/NAME",
    )
    sft.add_argument("--validation", help="examples that are measured on and not learned from [a tenth of --examples]")
    sft.add_argument("--out", type=Path, required=True, help="run folder; the model is in its policy/")

    prefer = command(
        "prefer",
        do_prefer,
        "Learn from preferences without reinforcement learning: DPO, IPO, KTO, ORPO or SimPO.",
        "accord prefer --pairs pairs.jsonl --out runs/preferred",
        PreferenceSettings,
    )
    prefer.add_argument("--model", default=BUNDLED, help=MODEL_HELP + "; also the reference")
    prefer.add_argument("--pairs", help="file or dataset with prompt, chosen, rejected")
    add_ranked(prefer)
    prefer.add_argument(
        "--validation", metavar="FILE", help="pairs that are measured on and not learned from [those of a tenth of the prompts]"
    )
    prefer.add_argument("--out", type=Path, required=True, help="run folder; the model is in its policy/")

    rl = command(
        "rl",
        do_rl,
        "Align a model with a reward: a reward model, a function over texts, a classifier, or a weighted list.",
        "accord rl --prompts my.jsonl --reward my_rewards:brevity --out runs/brief",
        RLSettings,
    )
    rl.add_argument("--model", default=BUNDLED, help=MODEL_HELP)
    rl.add_argument("--prompts", help="prompts: .jsonl, .json, .parquet, .txt or hf:ORG/NAME")
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
        help="documents: .txt or .md files, a folder of them, rows with a field 'text'; repeat",
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
    chat.add_argument("--model", default=BUNDLED, help=MODEL_HELP)
    chat.add_argument("--temperature", type=float, default=0.7, help="sampling temperature; 0 is greedy [0.7]")
    chat.add_argument("--max-new-tokens", type=int, default=200, help="length limit of an answer [200]")
    return parser, commands.choices


def settings(arguments: argparse.Namespace, kind: type[BaseModel], base: BaseModel | None = None) -> dict[str, Any]:
    """Values from --config under those typed on the command line, over those of ``base``, checked."""
    values: dict[str, Any] = {}
    if arguments.config:
        path = Path(arguments.config)
        if not path.is_file():
            raise UserError(f"Config file {path} does not exist.")
        values = load_yaml(read_text(path), str(path))
        block = {"rl": "rl", "sft": "sft", "prefer": "prefer", "pretrain": "pretrain", "evaluate": "evaluation"}.get(arguments.command, "")
        if "command" in values and isinstance(values.get(block), dict):  # the config.yaml of a run
            values = values[block]
    values |= given(arguments, kind)
    if base is not None:
        values = base.model_dump() | values
    return build(kind, values, arguments.config or f"accord {arguments.command}").model_dump()


def do_demo(arguments: argparse.Namespace) -> None:
    arguments.recipe, arguments.show, arguments.labelers = "demo", False, None
    if arguments.out is None and arguments.seed:
        arguments.out = Path("runs") / f"demo-seed-{arguments.seed}"
    do_run(arguments)


def do_run(arguments: argparse.Namespace) -> None:
    import yaml

    recipe = build(Recipe, load_yaml(recipe_text(arguments.recipe), arguments.recipe), arguments.recipe)
    if arguments.seed is not None:
        recipe = recipe.with_seed(arguments.seed)
    if arguments.labelers:
        recipe = recipe.model_copy(update={"feedback": recipe.feedback.model_copy(update={"labelers": arguments.labelers})})
    if arguments.show:
        print(yaml.safe_dump(recipe.model_dump(), sort_keys=False), end="")
        return
    from accord.pipeline import start

    arguments.out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    start(recipe, arguments.out).go()


def do_plan(arguments: argparse.Namespace) -> None:
    from accord.api import announce, plan_rl_run
    from accord.pipeline import plan_run

    path = Path(arguments.config)
    values = load_yaml(recipe_text(str(path / "config.yaml" if path.is_dir() else path)), arguments.config)
    if values and values.keys() <= RLSettings.model_fields.keys():  # settings of accord rl
        values = {"command": "rl", "model": arguments.model, "prompts": arguments.prompts, "reward": arguments.reward, "rl": values}
    if values.get("command") == "rl":
        announce(*plan_rl_run(values, arguments.config))
    else:
        recipe = values["recipe"] if values.get("command") == "run" else values
        announce(*plan_run(build(Recipe, recipe, arguments.config)))


def do_resume(arguments: argparse.Namespace) -> None:
    from accord.api import finish_rl, prepare_rl
    from accord.pipeline import Pipeline
    from accord.runs import Run

    run, config = Run.open(arguments.run, arguments.allow_changes)
    where = str(arguments.run / "config.yaml")
    if config["command"] == "run" and isinstance(config.get("recipe"), dict):
        Pipeline(build(Recipe, config["recipe"], where), run).go()
    elif config["command"] == "rl":
        finish_rl(run, prepare_rl(config, where))
        _after_rl(arguments.run, config.get("environment"))
    elif config["command"] in ("sft", "prefer", "pretrain"):
        from accord.tuning import finish, prepare

        _after_tuning(arguments.run, config["command"], finish(run, prepare(config, where)))
    else:
        raise UserError(f"{where} names no command that can be resumed ({config['command']!r}).")


def do_sample(arguments: argparse.Namespace) -> None:
    from accord.api import load, sample_to
    from accord.data.sources import read_prompts

    values = settings(arguments, SampleSettings)
    prompts = read_prompts(arguments.prompts)
    reference = load(arguments.reference) if arguments.reference else None
    count = sample_to(arguments.out, load(arguments.model), prompts, reference=reference, **values)
    console.print(f"{several(count, 'completion')} in {arguments.out}", soft_wrap=True)


def do_reward(arguments: argparse.Namespace) -> None:
    from accord.api import load, refuse_reward, train_reward

    values = settings(arguments, RewardSettings)
    refuse_reward(arguments.out)
    groups = preferences(arguments).groups(values["fail_weight"])
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


def do_label(arguments: argparse.Namespace) -> None:
    with needs("label"):
        from accord.feedback.intake import Intake, set_criterion
        from accord.feedback.web.retraining import Retraining
        from accord.feedback.web.serve import announce, forgotten, listen, serve, web_settings

    intake = Intake.read(arguments.completions, arguments.gold, arguments.calibration, arguments.rankings)
    if arguments.new_password is not None:  # beside a server that runs, too
        with opened(arguments.store) as store:
            forgotten(store, web_settings(store, arguments.host, arguments.accounts, arguments.https, tuple(arguments.name)), arguments.host, arguments.port, arguments.new_password)  # fmt: skip
        return
    listening = listen(arguments.host, arguments.port)
    with opened(arguments.store, make=not intake.elsewhere) as store:
        store.set_queue(QueueSettings(**settings(arguments, QueueSettings, store.settings)))
        web = web_settings(store, arguments.host, arguments.accounts, arguments.https, tuple(arguments.name), arguments.requests)
        set_criterion(store, arguments.criterion)
        for line in intake.bring_into(store):
            console.print(line, soft_wrap=True, markup=False)
        if arguments.priority:
            from accord.feedback.priority import uncertainty
            from accord.reward.model import RewardModel

            store.set_priority(uncertainty(store.completions(), [RewardModel.load(folder) for folder in arguments.priority]))
        announce(store, web, listening, f"Ctrl-C ends it; labels are in {store.database.url}")
        folder = arguments.rewards or Path("labels.rewards" if "://" in arguments.store else f"{arguments.store}.rewards")
        serve(store, web, listening, Retraining(store, folder, arguments.model, every=arguments.retrain_every))


def do_backup(arguments: argparse.Namespace) -> None:
    with opened(arguments.store) as store:
        from accord.feedback.backup import back_up

        rows = back_up(store, arguments.out)
    console.print(f"{_rows(rows)} in {arguments.out}. Passwords' hashes are in it; keep it as you keep the store.", soft_wrap=True)


def do_restore(arguments: argparse.Namespace) -> None:
    if not arguments.backup.is_file():
        raise UserError(f"Backup {arguments.backup} does not exist.")
    if not zipfile.is_zipfile(arguments.backup):
        raise UserError(f"{arguments.backup} is no backup of a label store, or damaged.")
    with opened(arguments.store, make=True) as store:
        from accord.feedback.backup import restore

        rows = restore(arguments.backup, store)
    console.print(f"{_rows(rows)} in {arguments.store}", soft_wrap=True, markup=False)


def _rows(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in rows.items())


def do_agreement(arguments: argparse.Namespace) -> None:
    from accord.data.sources import read_rankings
    from accord.feedback.agreement import agreement, labeler_weights
    from accord.feedback.summary import print_agreement, to_json

    if bool(arguments.rankings) == bool(arguments.store):
        raise UserError("Give either --rankings or --store.")
    if arguments.store:
        with opened(arguments.store) as store:
            rankings = list(store.rankings())
    else:
        rankings = read_rankings(arguments.rankings)
    found = agreement(rankings, arguments.gold)
    print_agreement(found)
    if arguments.json:
        write_whole(arguments.json, json.dumps(to_json(found), indent=1, ensure_ascii=False) + "\n")
    if arguments.weights:
        weights = labeler_weights([r for r in rankings if r.labeler != arguments.gold])
        write_whole(arguments.weights, json.dumps(weights, indent=1, ensure_ascii=False) + "\n")
        console.print(f"Weights in {arguments.weights}   (use: accord reward --labeler-weights {arguments.weights} ...)", soft_wrap=True)


def do_export(arguments: argparse.Namespace) -> None:
    from accord.feedback.export import export

    with preferences(arguments).ranked() as (some, weights):
        count = export(some, arguments.kind, arguments.out, arguments.fail_weight, weights)
    what = {"groups": "prompt", "unpaired": "completion", "dataset": "pair"}.get(arguments.kind, arguments.kind.removesuffix("s"))
    console.print(f"{several(count, what)} in {arguments.out}", soft_wrap=True)


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
    prepared = prepare(config, f"accord {command}")
    _after_tuning(arguments.out, command, finish(Run.create(arguments.out, config), prepared))


MEASURES = {
    "loss": "Held-out loss {}",
    "bits_per_byte": "Bits a byte {}",
    "accuracy": "Held-out pairs told apart by the implicit reward: {}",
}


def _after_tuning(folder: Path, command: str, tuned: Tuned) -> None:
    for name, text in MEASURES.items():
        if name in tuned.after:
            before = f"{tuned.before[name]:.3f} -> " if name in tuned.before else ""
            console.print(text.format(f"{before}{tuned.after[name]:.3f}") + ".", soft_wrap=True)
    use = f'accord look-inside {folder / "policy"} "Once"' if command == "pretrain" else f"accord chat --model {folder / 'policy'}"
    console.print(f"Report: {folder / 'report.html'}\nModel:  {folder / 'policy'}   (try: {use})", soft_wrap=True)


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
    _after_rl(arguments.out, config["environment"])


def _after_rl(folder: Path, environment: str | None) -> None:
    use = (
        f"accord play --model {folder / 'policy'} --environment {environment}"
        if environment
        else f"accord chat --model {folder / 'policy'}"
    )
    console.print(f"Report: {folder / 'report.html'}\nModel:  {folder / 'policy'}   (try: {use})", soft_wrap=True)


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
    import json
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

    for name, least in (("window", 2), ("samples", 0), ("max_new_tokens", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be {least} or more.")
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

    if arguments.episodes < 1:
        raise UserError(f"--episodes is {arguments.episodes}; it must be 1 or more.")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one sentence and a non-zero code, never in a traceback."""
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        parser, commands = make_parser()
        check_words(parser, commands, words)
        arguments = parser.parse_args(words)
        if arguments.command in ("chat", "label"):  # they end by Ctrl-C
            arguments.function(arguments)
            return 0
        with orderly_stop():
            arguments.function(arguments)
        return 0
    except Interrupted as stopped:
        folder = getattr(arguments, "run", None) or getattr(arguments, "out", None)
        begun = folder is not None and (Path(folder) / "config.yaml").is_file()
        hint = (
            f" Go on with: accord resume {folder}"
            if begun and arguments.command in ("demo", "run", "rl", "sft", "prefer", "pretrain", "resume")
            else " Run the same command again to go on."
        )
        console.print(f"[yellow]{stopped}[/]{hint if folder else ''}", soft_wrap=True)
        return stopped.code
    except UserError as error:
        print(f"accord: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("accord: stopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"accord: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 2
