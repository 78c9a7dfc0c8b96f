"""The pages of docs/your-own-script.md."""

import re

from tests.helpers.launch import FRAMEWORKS, ROOT


def _name(page: str) -> str:
    if "import torch" in page:
        return "elastic" if "os.replace" in page else "torch"
    return "tape" if "GradientTape" in page else "keras"


PAGES = {
    _name(page): page
    for page in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-own-script.md").read_text(), re.DOTALL)
    if ("torch" if "import torch" in page else "tf") in FRAMEWORKS
}


def numbers(text: str) -> list[float]:
    """The losses that a page prints."""
    return [float(word) for line in re.findall(r"losses: (.*)", text) for word in re.findall(r"\d+\.\d+", line)]
