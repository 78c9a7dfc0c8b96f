"""Which ranks exchange something among themselves."""

from common.config.composition import compose
from common.config.layout import process_sets
from common.distributed.topology import Topology


def test_hosts_and_their_first_ranks_exchange_among_themselves() -> None:
    cfg = compose("mnist_mlp", ["compression=topk", "compression.two_level=true"])
    sets = process_sets(Topology(5, 6, 1, 2), cfg)
    assert [list(ranks) for ranks in sets] == [[0, 1], [2, 3], [4, 5], [0, 2, 4]]
    assert process_sets(Topology(1, 2, 1, 2), cfg) == []
