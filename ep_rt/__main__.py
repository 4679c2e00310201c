"""``python -m ep_rt``: what can be done from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import _version, doctor, planner_cli
from .bench import options, run
from .errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ep_rt", description="Expert-parallel communication for Mixture-of-Experts models."
    )
    parser.add_argument("--version", action="version", version=f"ep_rt {_version.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    options.add_parser(commands)
    doctor.add_parser(commands)
    planner_cli.add_parser(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command == "doctor":
        return doctor.main(doctor.options_of(parsed))
    try:
        if parsed.command == "plan":
            return planner_cli.main(planner_cli.options_of(parsed))
        chosen = options.options_of(parsed)
    except ConfigError as error:
        parser.error(str(error))
    return run.main(chosen, arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
