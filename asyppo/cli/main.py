"""The command line: from arguments to a configuration, with help and errors made of the dataclasses' docstrings.

What the commands do stands in ``commands.py``. Nothing heavy is imported before one runs, so that ``--help`` and a
mistyped name answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import traceback
from argparse import SUPPRESS
from collections.abc import Sequence
from functools import cache
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from asyppo.cli.commands import COMMANDS, Command
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.fields import by_path, check_names, did_you_mean, groups
from asyppo.config.files import (
    READY_CONFIGS,
    add_settings,
    config_file,
    configuration,
    in_one_line,
    read_settings,
    read_yaml,
)
from asyppo.config.setting import one_or_list
from asyppo.run.signals import exiting_at_once
from asyppo.version import __version__


class _Parser(ArgumentParser):
    """jsonargparse's, with a help of our own: theirs leaves out what lies below a field that may be null."""

    command: Command

    def format_help(self, formatter: Any = None) -> str:
        lines = [f"{self.prog}: {self.command.summary}", ""]
        for action in self._actions:
            # Fields of the configuration come below, from the dataclasses; some of jsonargparse's own are hidden.
            if (
                self.command.settings and action.dest.split(".")[0] in by_path(AsyPPOConfig)
            ) or action.help == SUPPRESS:
                continue
            name = ", ".join(action.option_strings) or action.dest
            if action.option_strings and action.nargs != 0:
                name += f" {action.metavar or 'VALUE'}"
            lines += _entry(name, " ".join((action.help or "").split()).replace("%%", "%"))
        if self.command.settings:
            lines += ["", "Settings. What is `critic: {num_critics: 2}` in a file is `--critic.num_critics 2` here."]
            for path, leaves in groups(AsyPPOConfig).items():
                branch = by_path(AsyPPOConfig)[path].branch if path else None
                lines += ["", *textwrap.wrap(f"{path}: {_plain(branch.__doc__)}", 100)] if branch else [""]
                for field in leaves:
                    note = "default: null" if field.branch else f"default: {show(field.default)}; {field.values}"
                    lines += _entry(f"--{field.path}", _plain(field.doc), f"  [{note}]")
        return "\n".join(lines) + "\n"


def _plain(doc: str | None) -> str:
    return " ".join((doc or "").split()).replace("``", "")


def _entry(name: str, text: str, note: str = "") -> list[str]:
    return [f"  {name}{note}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def show(value: Any) -> str:
    """Return a default as a YAML file would say it."""
    if isinstance(value, str) and value.strip() == value != "":
        return value
    return json.dumps(value, ensure_ascii=False)


@cache
def parser(name: str) -> _Parser:
    """The parser of one command; fields, defaults and help come from the configuration's dataclasses."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    made = _Parser(prog=f"asyppo {name}", exit_on_error=False, allow_abbrev=False)
    made.command = command
    command.add_arguments(made)
    if command.settings:
        made.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help=f"YAML file, or one of {', '.join(READY_CONFIGS)}. May be given several times; later ones, and the "
            f"options after them, override. {command.without_config}",
        )
        add_settings(made)
    made.add_argument("--traceback", action="store_true", help="Show the traceback of an error, too.")
    return made


def parse(argv: Sequence[str]) -> AsyPPOConfig:
    """Return the validated configuration of ``asyppo train …`` or another command that has one. Raises ConfigError."""
    return configuration(parse_arguments(argv))


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Return the arguments of ``asyppo COMMAND …``. Raises ConfigError; exits for ``--help`` and ``--version``."""
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help"):
        print(overview(), end="")
        raise SystemExit(0)
    if name == "--version":
        print(f"asyppo {__version__}")
        raise SystemExit(0)
    if name not in COMMANDS:
        raise ConfigError(f"{name}: unknown command{did_you_mean(name, dict.fromkeys(COMMANDS))}")
    command = COMMANDS[name]
    made = parser(name)
    _check_options(made, arguments)
    if command.settings:
        arguments = [*_implied(command, arguments), *_with_lists(_with_flags(_with_config_files(arguments)))]
    try:
        return made.instantiate(made.parse_args(arguments))
    except ArgumentError as error:
        raise ConfigError(in_one_line(str(error))) from error


def overview() -> str:
    """Return the text of ``asyppo --help``."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "asyppo: PPO with mini-critics for language models (AsyPPO).",
            "",
            *(f"  asyppo {name:<{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "  asyppo COMMAND --help  explains a command's options; --traceback shows an error's traceback.",
            "  asyppo --version",
            "",
        ]
    )


def _implied(command: Command, arguments: Sequence[str]) -> list[str]:
    """The configuration file that a command starts from; what the arguments say comes after it."""
    path = command.base_config(arguments)
    return [] if path is None else [f"--config={_checked_file(str(path))}"]


def _with_config_files(arguments: Sequence[str]) -> list[str]:
    """Replace the names of ready configurations by their files, and check the keys of every file."""
    done: list[str] = []
    for argument in arguments:
        is_value = done[-1:] == ["--config"]
        if is_value or argument.startswith("--config="):
            argument = argument if is_value else argument.removeprefix("--config=")
            done[len(done) - is_value :] = [f"--config={_checked_file(argument)}"]
        else:
            done.append(argument)
    return done


def _checked_file(name: str) -> str:
    """Return the file that ``--config name`` means, after a look at its keys; where it has one name in place of a list
    of them, what it says with that list. Raises ConfigError."""
    path = config_file(name)
    tree = read_settings(path)
    return str(path) if tree == read_yaml(path, "config", "a YAML file") else json.dumps(tree)


def _with_flags(arguments: Sequence[str]) -> list[str]:
    """``--policy.use_peft`` alone is ``--policy.use_peft=true``."""
    flags = {f"--{path}" for path, field in by_path(AsyPPOConfig).items() if field.annotation is bool}
    followers = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in flags and follower.startswith("--") else argument
        for argument, follower in zip(arguments, followers, strict=True)
    ]


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """``--reward_funcs a``, ``--reward_funcs=a`` and, as in TRL, ``--reward_funcs a b`` are lists of names."""
    lists = {f"--{path}": path for path, field in by_path(AsyPPOConfig).items() if field.is_list_of_names}
    done: list[str] = []
    waiting = list(arguments)
    while waiting:
        option, equals, value = waiting.pop(0).partition("=")
        if option not in lists:
            done.append(f"{option}{equals}{value}")
            continue
        names = [value] if equals else []
        while waiting and not equals and not waiting[0].startswith("--"):
            names.append(waiting.pop(0))
        if len(names) == 1 and (names[0].lstrip().startswith("[") or names[0] in ("null", "")):
            done.append(f"{option}={names[0]}")
        else:
            done.append(f"{option}={json.dumps(one_or_list(lists[option], names[0]) if len(names) == 1 else names)}")
    return done


def _check_options(made: _Parser, arguments: Sequence[str]) -> None:
    """Raise ConfigError at the first option that does not exist, with the nearest that does."""
    settings = by_path(AsyPPOConfig) if made.command.settings else {}
    own = [o.removeprefix("--") for action in made._actions for o in action.option_strings if o.startswith("--")]
    known = {**dict.fromkeys(own), **settings}
    for index, argument in enumerate(arguments):
        if not argument.startswith("--") or argument == "--":
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(iter(arguments[index + 1 : index + 2]), "")
        name = name.removesuffix("+")  # --reward_funcs+ appends
        inside_mapping = any(name.startswith(f"{path}.") and field.is_mapping for path, field in settings.items())
        if name not in known and not inside_mapping:
            raise ConfigError(f"--{name}: unknown option{did_you_mean(name, known, '--')}")
        if name in settings and settings[name].branch is not None and value.lstrip().startswith("{"):
            check_names(AsyPPOConfig, yaml.safe_load(value), f" in --{name}", f"{name}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``asyppo`` and return its exit status: 0; 1 for a run that failed; 2 for a setting, a file or a reward
    function that cannot work; 130 and 143 for one that SIGINT or SIGTERM ended, as a shell has it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        namespace = parse_arguments(arguments)
        with exiting_at_once():  # but for the training loop, which ends its step first
            return COMMANDS[arguments[0]].run(namespace)
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:  # a fault of ours, whose place is in the traceback
            raise
        if "--traceback" in arguments or os.environ.get("ASYPPO_TRACEBACK") == "1":
            traceback.print_exception(error)
        if os.environ.get("RANK", "0") == "0":  # every rank has it
            print(f"asyppo: error: {error}", file=sys.stderr)
        return status
