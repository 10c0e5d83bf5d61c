"""Completions, and what people say of them."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from accord.commands.options import PROMPTS_HELP, Command, add_model, add_ranked, preferences, settings
from accord.config import SampleSettings
from accord.disk import write_whole
from accord.errors import UserError, needs
from accord.feedback.given import opened
from accord.feedback.settings import QueueSettings
from accord.progress import console, several


def add(command: Command) -> None:
    """The commands of this family."""
    sample = command(
        "sample",
        do_sample,
        "K completions of each prompt, as JSONL.",
        "accord sample --prompts my.jsonl --per-prompt 4 --out completions.jsonl",
        SampleSettings,
    )
    add_model(sample)
    sample.add_argument("--prompts", required=True, help=PROMPTS_HELP)
    sample.add_argument(
        "--reference", help="decode from this model moved by --strength towards --model and beyond (see docs/algorithms.md, ilql)"
    )
    sample.add_argument("--out", type=Path, required=True, help="file to write; if it exists, sampling goes on after it")

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
    add_model(label, "what the overview's reward models are trained from; {}")
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


def do_sample(arguments: argparse.Namespace) -> None:
    from accord.api import load, sample_to
    from accord.data.sources import read_prompts

    values = settings(arguments, SampleSettings)
    prompts = read_prompts(arguments.prompts)
    reference = load(arguments.reference) if arguments.reference else None
    count = sample_to(arguments.out, load(arguments.model), prompts, reference=reference, **values)
    console.print(f"{several(count, 'completion')} in {arguments.out}", soft_wrap=True)


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
