"""The command line: one module per command, each with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ptkernels.cli import bench, env, explain, gradcheck, replace

__all__ = ["main"]

_COMMANDS = {
    "env": (env, "versions, loaded libraries, instruction sets and the kernel table: what an issue report needs"),
    "bench": (bench, "check every operator, then time it against its peers"),
    "gradcheck": (gradcheck, "gradcheck and gradgradcheck over every operator's sample inputs"),
    "explain": (explain, "which kernel a call would run, why, and what would make it faster"),
    "replace": (replace, "what replace() does to a model, before and after"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        argv: the arguments after the program's name; those of the process when not given.
    """
    parser = argparse.ArgumentParser(prog="ptkernels", description="Tools of ptkernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=(module.__doc__ or "").replace("``", ""))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ModuleNotFoundError, OSError) as error:
        print(f"ptkernels {arguments.command}: {error}", file=sys.stderr)
        return 2
