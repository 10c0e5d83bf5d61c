"""The command line: one subcommand a stage (:mod:`accord.commands`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel

from accord import __version__
from accord.commands import constitution, feedback, looking, recipes, training
from accord.commands.options import Function, Subcommands
from accord.config import add_options
from accord.errors import Interrupted, UserError, did_you_mean
from accord.progress import console, orderly_stop


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
    chosen = commands[words[0]]
    own = next((action.choices for action in chosen._actions if isinstance(action, argparse._SubParsersAction)), None)
    if own is not None:
        return check_words(chosen, own, words[1:])
    known = [option for action in chosen._actions for option in action.option_strings]
    for word in words[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            raise UserError(f"Unknown option '{name}'.{did_you_mean(name, known)} See: {chosen.prog} --help")


def make_parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    parser = Parser(prog="accord", description="Bring a language model into accord with what people want.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"accord {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, function: Function | None, text: str, example: str, *kinds: type[BaseModel], under: Subcommands | None = None
    ) -> Parser:
        sub: Parser = (under or commands).add_parser(
            name, help=text, description=text, epilog=f"Example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if function is not None:
            sub.set_defaults(function=function)
        if kinds:
            sub.add_argument("--config", metavar="FILE", help="YAML file of the settings below; options on the command line win")
        for kind in kinds:
            add_options(sub.add_argument_group("settings"), kind)  # type: ignore[arg-type]
        return sub

    for family in (recipes, feedback, training, constitution, looking):
        family.add(command)
    return parser, commands.choices


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
