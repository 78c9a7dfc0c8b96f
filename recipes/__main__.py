"""Lists the recipes: python -m recipes."""

import ast
from pathlib import Path


def main() -> None:
    """Prints each recipe's name and the first line of its docstring, without importing a framework."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        print(f"{path.stem:24}{doc.splitlines()[0]}")


if __name__ == "__main__":
    main()
