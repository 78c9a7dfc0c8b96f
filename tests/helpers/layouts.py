"""Small models in one layout after another."""

from common.config import layout
from common.config.composition import compose
from common.distributed.topology import Topology

# 9 steps; the eighth of the digits' epochs of 204 has 9 examples, fewer than there are micro-batches.
TASKS = {
    "mnist_mlp": ["model.hidden_sizes=[32,32,32]", "train.global_batch_size=204"],
    "mnist_cnn": ["model.channels=[8,16]", "model.hidden_size=32", "train.global_batch_size=204"],
    "transformer_lm": [
        *("data.path=LICENSE", "model.width=32", "model.num_layers=2", "model.num_heads=2", "model.context=16"),
        *("train.global_batch_size=24", "lr_schedule.warmup_steps=10", "optimizer.freeze_step=6"),
        *("train.checkpoint_every=2", "train.keep_checkpoints=9"),
    ],
}
COMMON = ["train.max_steps=9", "train.log_every=1", "optimizer=adamw", "data.ledger=true"]
_PIPELINE = ["parallel=pipeline", "parallel.num_micro_batches=2"]
_SERVER = ["parallel=parameter_server"]
_SCHEDULES = {
    "gpipe": [*_PIPELINE, "parallel.schedule=gpipe"],
    "zb_h1": [*_PIPELINE, "parallel.schedule=zb_h1"],
    "interleaved": [*_PIPELINE, "parallel.schedule=interleaved", "parallel.virtual_stages_per_rank=2"],
}
_TWO_STAGES = {"1f1b": _PIPELINE, "sharded": ["optimizer.sharded=true"]}
_FOUR_STAGES = {"four stages": [*_PIPELINE, "parallel.pipeline_stages=4"]}
_TWO_BY_TWO = {"two by two": _PIPELINE}
_THREE_AND_ONE = {"three and one": [*_PIPELINE, "parallel.replicas_per_stage=[3,1]"]}
_SERVERS = {"one server": _SERVER, "two servers": [*_SERVER, "parallel.num_servers=2"]}
# By number of ranks and task; not all pairs, as schedules, servers and pieces of an optimizer know nothing of layers.
LAYOUTS: dict[int, dict[str, dict[str, list[str]]]] = {
    1: {task: {"whole": []} for task in TASKS},
    2: {
        "mnist_mlp": _TWO_STAGES | _SCHEDULES,
        "mnist_cnn": {"1f1b": _PIPELINE},
        "transformer_lm": _TWO_STAGES | {"zb_h1": _SCHEDULES["zb_h1"]},
    },
    3: {"mnist_mlp": _SERVERS, "mnist_cnn": {}, "transformer_lm": {"one server": _SERVER}},
    4: {"mnist_mlp": _FOUR_STAGES, "mnist_cnn": _TWO_BY_TWO, "transformer_lm": _FOUR_STAGES | _THREE_AND_ONE},
}
# Trained whole and resumed: the stages share a weight, and two ranks may have one stage. dgc keeps what topk does.
RESUMED = {
    name: [*TASKS["transformer_lm"], *_PIPELINE, "train.max_steps=8", "train.log_every=1", "train.clip_norm=1", *values]
    for name, values in {
        "powersgd": ["compression=powersgd", "compression.rank=2", "optimizer.freeze_step=6"],
        "dgc": ["compression=dgc", "optimizer=sgd", "optimizer.lr=0.05", "compression.warmup_steps=4"],
    }.items()
}
# Has another curve than the others.
NOT_WAITING = [*_SERVER, "parallel.mode=async", "parallel.max_staleness=4", "compression=int8", "train.max_steps=150"]
NOT_WAITING += ["chaos=slow:rank=2,seconds=0.01"]
# Stages that skip a step, and compress.
COMPRESSED_STAGES = [
    *("model.hidden_sizes=[32,32,32]", "train.global_batch_size=60", "train.log_every=1", "train.max_steps=40"),
    *(*_PIPELINE, "compression=topk", "precision=fp16", "precision.initial_loss_scale=1e8"),
]
# Goes on from a run on one rank less.
GOES_ON = {3: [*_SERVER, "parallel.num_servers=2"], 4: ["optimizer.sharded=true"]}


def resumed(num_ranks: int) -> dict[str, tuple[str, list[str]]]:
    """Runs that are made whole, and again from their middle."""
    common = ["compression.min_numel=64", "train.checkpoint_every=4", "train.keep_checkpoints=9"]
    common += ["parallel.replicas_per_stage=[2,1]", "train.global_batch_size=24"] if num_ranks == 3 else []
    runs = {}
    for name, values in RESUMED.items():
        values = [value for value in values if name != "dgc" or "freeze_step" not in value]
        runs[name] = ("transformer_lm", [*values, *common])
    return runs


def layouts(num_ranks: int) -> dict[str, tuple[str, list[str]]]:
    """All tasks in all layouts of a number of ranks."""
    return {
        f"{task}/{name}": (task, [*values, *COMMON, *layout])
        for task, values in TASKS.items()
        for name, layout in LAYOUTS[num_ranks][task].items()
    }


def runs(num_ranks: int) -> dict[str, tuple[str, list[str]]]:
    """Name -> task and overrides of all runs on so many ranks."""
    found = layouts(num_ranks) | (resumed(num_ranks) if num_ranks in (2, 3) else {})
    if num_ranks in GOES_ON:
        found["goes on"] = ("transformer_lm", [*TASKS["transformer_lm"], *COMMON, *GOES_ON[num_ranks]])
    if num_ranks == 3:
        overrides = [*TASKS["mnist_mlp"], *COMMON, *NOT_WAITING, "optimizer=sgd"]
        found["not waiting"] = ("mnist_mlp", overrides)
    if num_ranks == 4:
        found["compressed stages"] = ("mnist_mlp", COMPRESSED_STAGES)
    return found


def process_sets(num_ranks: int) -> set[tuple[int, ...]]:
    """The subsets of ranks that exchange something in any of the runs."""
    place = Topology(0, num_ranks, 0, num_ranks)
    cfgs = [compose(task, overrides) for task, overrides in runs(num_ranks).values()]
    return {tuple(ranks) for cfg in cfgs for ranks in layout.process_sets(layout.arranged(place, cfg), cfg)}
