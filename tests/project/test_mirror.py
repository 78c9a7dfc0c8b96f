"""Both bindings have the same public names with the same parameters, but for one list with its reasons."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from tests.helpers.launch import ROOT

BINDINGS = ("torch", "tf")
Parameters = tuple[str, ...] | None  # None: an attribute or a property

IN_PLACE = "PyTorch writes gradients where they lie; TensorFlow's functions return them"
OWN_CLASS = "follows the framework's own base class"
EAGER = "PyTorch runs actions one by one; TensorFlow compiles what it can"
# Pattern of file and name -> why only one binding has it, or why its parameters differ.
DIFFERENCES = {
    "script/*": "Keras has fit and callbacks; a loop in PyTorch has a loader",
    "distributed/runtime.py broadcast_variables": "PyTorch's state has names",
    "job.py Job.__init__": "Keras sets the dtype policy before layers are made",
    "engine.py Engine.compile": EAGER,
    "distributed/runtime.py Optimizer.*": OWN_CLASS,
    "distributed/runtime.py device": "PyTorch's tensors name their device",
    "distributed/runtime.py dtype": "Keras' dtypes are strings",
    "distributed/runtime.py to_tensor*": "PyTorch's tensors name their device",
    "distributed/runtime.py seed*": "Keras' dropout has its own random state, PyTorch one for all",
    "distributed/runtime.py shared_zeros": "TensorFlow allocates the tensors of a graph itself",
    "distributed/messages.py Incoming.device": "PyTorch's tensors name their device",
    "gradients/allreduce.py AllreduceSync.prepare_for_backward": "backward itself sends in PyTorch; see accept",
    "gradients/allreduce.py AllreduceSync.accept": "backward returns gradients in TensorFlow",
    "gradients/allreduce.py AllreduceSync.close": "hooks of backward; a graph has none",
    "gradients/allreduce.py AllreduceSync.names": "Keras' variables are known by their order",
    "gradients/allreduce.py AllreduceSync.load": IN_PLACE,
    "gradients/allreduce.py AllreduceSync.variables": IN_PLACE,
    "gradients/autotune.py Model*": "PyTorch has a type for it",
    "gradients/bucket_exchange.py *": "hooks of backward; a graph's order of data does it in TensorFlow",
    "gradients/buckets.py BucketBuffers.*": IN_PLACE,
    "gradients/compression.py *": IN_PLACE,
    "gradients/compressors/*": IN_PLACE,
    "gradients/compressor_set.py CompressorSet.*": IN_PLACE,
    "gradients/health_probe.py HealthProbe.*": IN_PLACE,
    "gradients/lane_compressors.py *": "lanes wait as generators in PyTorch, as threads in TensorFlow",
    "gradients/loss_scaler.py LossScaler.*": IN_PLACE,
    "gradients/norms.py squared_norm": "squares of the accurate norm serve in PyTorch",
    "gradients/stage_sums.py StageSums.sum_tied": IN_PLACE,
    "gradients/lane_sync.py LaneSync.*": "as AllreduceSync",
    "gradients/optimizers.py [AS]*": OWN_CLASS,
    "gradients/optimizers.py *": "PyTorch's optimizers keep their state by parameter, Keras' in lists",
    "models/*": OWN_CLASS,
    "parallel/parameter_server.py ServedSync.*": "as AllreduceSync",
    "parallel/pipeline.py *": EAGER,
    "parallel/sharded.py FlatWeights.*": "parameters are views of flat memory in PyTorch, copies in TensorFlow",
    "parallel/sharded.py Partition.*": "as FlatWeights",
    "parallel/sharded.py S*Optimizer.*": OWN_CLASS,
    "parallel/split_backward.py *": "a tape makes both gradients at once",
    "parallel/stage.py Stage.*": OWN_CLASS,
    "parallel/stage.py build_on_meta": "PyTorch has a meta device",
    "parallel/stage.py flops_of_product": "PyTorch has a counter",
    "training/checkpoint.py names": "Keras' variables have paths instead of names",
    "training/checkpoint.py weights": "PyTorch's parameters have names",
}


def test_public_names_have_twins_or_a_reason() -> None:
    torch, tf = (names(binding) for binding in BINDINGS)
    different = [name for name in sorted(torch.keys() | tf.keys()) if torch.get(name, ...) != tf.get(name, ...)]
    unexplained = [name for name in different if not any(fnmatch(name, pattern) for pattern in DIFFERENCES)]
    assert not unexplained
    assert not [pattern for pattern in DIFFERENCES if not any(fnmatch(name, pattern) for name in different)]


def names(binding: str) -> dict[str, Parameters]:
    """Each public name of a binding, as "<file> <name>", with its parameters."""
    folder = ROOT / "common" / binding
    return {
        f"{path.relative_to(folder).as_posix()} {name}": parameters
        for path in sorted(folder.rglob("*.py"))
        for name, parameters in public(path)
    }


def public(path: Path) -> Iterator[tuple[str, Parameters]]:
    """The public functions and classes of a module, and the public members of its classes."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, parameters(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, None
            yield from ((f"{node.name}.{name}", own) for name, own in members(node).items())


def members(node: ast.ClassDef) -> dict[str, Parameters]:
    """The public methods, properties and attributes of a class and of its bases in common/."""
    found: dict[str, Parameters] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes():
            found |= members(classes()[base.id])
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            found[member.target.id] = None
        elif isinstance(member, ast.FunctionDef):
            is_property = any(ast.unparse(decorator) == "property" for decorator in member.decorator_list)
            if member.name == "__init__":
                found |= dict.fromkeys(attributes(member))
            if member.name == "__init__" or not member.name.startswith("_"):
                found[member.name] = None if is_property else parameters(member)
    return found


@cache
def classes() -> dict[str, ast.ClassDef]:
    """The classes of common/ whose names tell which one is meant."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in (ROOT / "common").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def attributes(init: ast.FunctionDef) -> Iterator[str]:
    """The public attributes that __init__ sets."""
    for node in ast.walk(init):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
            continue
        if ast.unparse(node.value) == "self" and not node.attr.startswith("_"):
            yield node.attr


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """The names of a function's parameters."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *filter(None, [given.vararg]), *given.kwonlyargs]
    return tuple(each.arg for each in every if each.arg != "self")
