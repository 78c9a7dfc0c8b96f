"""What scripts of your own import: `fit` for Keras and TensorFlow, `loop` for PyTorch (docs/your-own-script.md).

The parts are in the package common. A script may have a module `common` of its own: each then finds its own one.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PARTS = {"fit": "common.tf.script.fit", "loop": "common.torch.script.loop"}
_ROOT = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> ModuleType:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {' and '.join(_PARTS)}")
    module = _import(_PARTS[name])
    globals()[name] = module
    return module


def _import(name: str) -> ModuleType:
    """Imports a part, also if `common` is the name of a module of the script, which then keeps the name."""
    spec = importlib.util.find_spec("common")
    if spec and spec.origin and Path(spec.origin).resolve() == _ROOT / "common" / "__init__.py":
        return importlib.import_module(name)
    of_script = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == "common"}
    sys.path.insert(0, str(_ROOT))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(_ROOT))
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in Path(folder).iterdir():
                sys.modules.pop(f"common.{path.stem}", None)
        sys.modules.pop("common", None)
        sys.modules.update(of_script)
