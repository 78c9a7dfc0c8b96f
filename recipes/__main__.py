"""Lists the recipes and commands, and runs a command: python -m recipes [list | <command> key=value ...]."""

import ast
import importlib
import sys
from pathlib import Path

from common.errors import ConfigError

COMMANDS = Path(__file__).parent / "commands"
WORDS_FOR_LIST = ("list", "help", "-h", "--help")


def print_list() -> None:
    """Prints each recipe's and command's name and the first line of its docstring, without importing it."""
    for folder, separator in ((Path(__file__).parent, "_"), (COMMANDS, "-")):
        for path in sorted(folder.glob("[!_]*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            print(f"{path.stem.replace('_', separator):24}{doc.splitlines()[0]}")


def main() -> None:
    """The entry point of the command line."""
    name, *words = sys.argv[1:] or ["list"]
    if name in WORDS_FOR_LIST:
        print_list()
        return
    commands = [path.stem.replace("_", "-") for path in sorted(COMMANDS.glob("[!_]*.py"))]
    if name not in commands:
        print(
            f"{name}: no such command; choose {'|'.join(commands)}, or python -m recipes.<recipe> to train",
            file=sys.stderr,
        )
        sys.exit(2)
    command = importlib.import_module(f"recipes.commands.{name.replace('-', '_')}")
    if {"-h", "--help"} & set(words):
        print(command.__doc__)
        return
    try:
        command.main(words)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
