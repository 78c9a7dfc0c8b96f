"""Suggestions for words of the command line that name no key."""

import difflib
from collections.abc import Iterable, Sequence

_FLAGS = {
    **dict.fromkeys(("-m", "--multirun"), "sweeps are not done by a recipe; start one job for each value"),
    **dict.fromkeys(("-c", "--cfg", "-i", "--info"), "--help prints the configuration that the other words lead to"),
    **dict.fromkeys(
        ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name"),
        "options are read from conf/ alone; put a file into conf/<group>/ and choose it with group=option",
    ),
}
_HAVE_VALUES = ("-c", "--cfg", "-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name", "-i", "--info")
_SYNONYMS = {
    "batch": "train.global_batch_size",
    "batch_size": "train.global_batch_size",
    "dtype": "precision",
    "gradient_accumulation_steps": "parallel.num_micro_batches",
    "learning_rate": "optimizer.lr",
    "num_epochs": "train.epochs",
    "num_steps": "train.max_steps",
    "output_dir": "run.dir",
    "run.name": "run.dir",
    "steps": "train.max_steps",
}
_RANKS = "the number of ranks is that of horovodrun -np, and there is no key for it"
_NO_KEYS = {
    **dict.fromkeys(
        ("cuda", "device", "gpu"), "the device is chosen by itself, a GPU where the framework sees one; there is no key"
    ),
    **dict.fromkeys(("gpus", "num_gpus", "num_ranks", "world_size"), _RANKS),
}


def split_flags(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words that look like flags, each with the advice for it, and the other words."""
    problems, others, passed_over = {}, [], ""
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("-"):
            problems[word] = _FLAGS.get(flag, "no such flag; keys are set with key=value, and --help lists them")
        elif "=" in word or passed_over not in _HAVE_VALUES:
            others.append(word)
        passed_over = word
    return problems, others


def why_no_key(key: str) -> str | None:
    """Why a key that users may look for does not exist; None for other keys."""
    return _NO_KEYS.get(_last(key))


def near(key: str, known: Iterable[str]) -> list[str]:
    """The known keys that may be meant: a synonym, else keys with the same last component, else similar spelling."""
    known = list(known)
    synonym = _SYNONYMS.get(key) or _SYNONYMS.get(_last(key))
    if synonym:
        return [synonym]
    return [one for one in known if _last(one) == _last(key)] or difflib.get_close_matches(key, known, n=1)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
