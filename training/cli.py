"""The command `modeling-uhop`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ..version import __version__
from .errors import errors_in_one_line
from .info import check_installed


# Each command: the module whose `main(arguments)` it calls, and what it does.
COMMANDS = {
    "train": (".train_command", "train and evaluate a model from a recipe, or on a data set without a recipe"),
    "sweep": (".sweep", "run recipes with several seeds and variants, and collect the results"),
    "evaluate": (".evaluation", "evaluate the finished run of a recipe again, also on other data"),
    "push": (".push", "upload the finished run of a recipe to the Hub"),
    "recipes": (".recipes", "list the recipes"),
    "demo": (".demo", "open the demo in a browser"),
    "info": (".info", "print versions, devices and attention kernels, for a bug report"),
}
# Commands that run without the packages of the extra `train`.
PLAIN = ("recipes", "demo", "info")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="modeling-uhop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listed(), add_help=False
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=__version__)
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given[:1])
    if args.command is None:
        parser.print_help()
        sys.exit(0 if args.help else 2)
    with errors_in_one_line():
        if args.command not in PLAIN:
            check_installed()
        import_module(COMMANDS[args.command][0], __package__).main(given[1:])


def _listed() -> str:
    return "\n".join(["commands:", *(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())])


if __name__ == "__main__":
    main()
