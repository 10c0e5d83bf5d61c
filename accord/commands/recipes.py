"""Recipes: every stage in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from accord.commands.options import Command, add_model
from accord.commands.training import after_rl, after_tuning
from accord.config import Recipe, RLSettings, build, load_yaml, recipe_text
from accord.errors import UserError


def add(command: Command) -> None:
    """The commands of this family."""
    demo = command("demo", do_demo, "The whole of RLHF with the bundled model, in one run with a report.", "accord demo --seed 1")
    demo.add_argument("--seed", type=int, default=0, help="luck of every stage [0]")
    demo.add_argument("--out", type=Path, help="run folder [runs/demo, or runs/demo-seed-N]")

    run = command(
        "run",
        do_run,
        "All stages of a recipe, from prompts to an aligned model, measured, with a report.",
        "accord run my-recipe.yaml --out runs/mine",
    )
    run.add_argument(
        "recipe", help="a shipped recipe (demo, from-nothing, constitution) or a YAML file; start from: accord run demo --show"
    )
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
    plan.add_argument(
        "config",
        help="a recipe (demo, from-nothing, constitution, or a YAML file), a run folder or its config.yaml, or a YAML file of accord rl's settings",
    )
    add_model(plan, "with settings of accord rl: {}")
    plan.add_argument("--prompts", help="with settings of accord rl: its prompts")
    plan.add_argument("--reward", action="append", metavar="[WEIGHT*]SPEC", help="with settings of accord rl: its reward, if it is a model")

    resume = command("resume", do_resume, "Go on with a run that was stopped, from the last thing it finished.", "accord resume runs/demo")
    resume.add_argument("run", type=Path, help="run folder")
    resume.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on although settings in config.yaml, or files it names, are not those the run was started with; history.jsonl says so",
    )


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
        part, field = (
            ("constitution", "people") if recipe.constitution else ("feedback", "labelers")
        )  # beside a judge, people rank the rest
        values = recipe.model_dump()
        values[part][field] = arguments.labelers
        recipe = build(Recipe, values, arguments.recipe)
    if arguments.show:
        print(yaml.safe_dump(recipe.model_dump(), sort_keys=False), end="")
        return
    from accord.pipeline import start

    arguments.out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    start(recipe, arguments.out).go()


def do_plan(arguments: argparse.Namespace) -> None:
    from accord.api import announce, plan_rl_run
    from accord.pipeline import announce_run
    from accord.tuning import plan_tuning_run

    path = Path(arguments.config)
    values = load_yaml(recipe_text(str(path / "config.yaml" if path.is_dir() else path)), arguments.config)
    if values and values.keys() <= RLSettings.model_fields.keys():  # settings of accord rl
        values = {"command": "rl", "model": arguments.model, "prompts": arguments.prompts, "reward": arguments.reward, "rl": values}
    if values.get("command") == "rl":
        announce(*plan_rl_run(values, arguments.config))
    elif values.get("command") in ("sft", "prefer", "pretrain"):
        announce(None, plan_tuning_run(values, arguments.config))
    else:
        recipe = values["recipe"] if values.get("command") == "run" else values
        announce_run(build(Recipe, recipe, arguments.config))


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
        after_rl(arguments.run, config.get("environment"))
    elif config["command"] in ("sft", "prefer", "pretrain"):
        from accord.tuning import finish, prepare

        after_tuning(arguments.run, config["command"], finish(run, prepare(config, where)))
    else:
        raise UserError(f"{where} names no command that can be resumed ({config['command']!r}).")
