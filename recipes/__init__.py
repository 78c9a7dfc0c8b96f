"""Training recipes: `python -m recipes` lists them, `python -m recipes.<name> --help` explains one."""
