"""Data-parallel PyTorch loops on real ranks: what scripts as in tests/scripts/ do not show."""

from typing import Any

from common.errors import TrainingError
from tests.helpers import compressors

import pytest


def data(num_examples: int = 65) -> Any:
    """A dataset that is the same on all ranks."""
    import torch
    from torch.utils.data import TensorDataset

    torch.manual_seed(1)
    return TensorDataset(torch.randn(num_examples, 8), torch.randint(3, (num_examples,)))


def build(*layers: Any) -> Any:
    """A small model with the same weights on all ranks."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), *layers, nn.GELU(), nn.Linear(16, 3))


def train(run: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    """An epoch of a plain loop; its losses."""
    from torch.nn import functional as F

    losses = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))
    return losses


def prepared(model: Any, exchange: Any = None, **options: Any) -> tuple[Any, Any, Any, Any]:
    """A run, a model, an optimizer and a loader of all ranks."""
    from common.torch.script import loop

    import torch
    from torch.utils.data import DataLoader

    run = loop.start(seed=1, **(exchange or {}))
    model, optimizer = run.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    return run, model, optimizer, run.prepare(DataLoader(data(), batch_size=16, **options))


def refused(capfd: pytest.CaptureFixture[str], action: Any) -> str:
    """What rank 0 prints when all ranks refuse an action with status 2."""
    with pytest.raises(SystemExit) as end:
        action()
    assert end.value.code == 2
    return capfd.readouterr().err


@pytest.mark.ranks(2, framework="torch")
def test_ranks_that_differ_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from common.torch.script import loop

    import torch
    from torch import nn
    from torch.utils.data import DataLoader, RandomSampler

    run = loop.start(seed=1)

    def sampler() -> None:
        order = RandomSampler(data(), generator=torch.Generator().manual_seed(run.rank))
        next(iter(run.prepare(DataLoader(data(), batch_size=16, sampler=order))))

    actions = {
        "weights of the models": lambda: run.prepare(build(nn.Linear(16 + run.rank, 16 + run.rank))),
        "datasets": lambda: run.prepare(DataLoader(data(65 + run.rank), batch_size=16)),
        "draw other examples": sampler,
        "compression='zip': choose from": lambda: loop.start(compression="zip"),
        "ratios: choose from": lambda: loop.start(compression={"name": "topk", "ratios": 1}),
        "losses='max'": lambda: loop.start(losses="max"),
        "noise='all': choose from batch, rank": lambda: loop.start(noise="all"),
    }
    for message, action in actions.items():
        assert (message in refused(capfd, action)) == (run.rank == 0), message


@pytest.mark.ranks(2, framework="torch")
def test_a_parameter_that_one_rank_does_not_use(runtime: Any) -> None:
    import torch
    from torch import nn

    run, model, optimizer, loader = prepared(nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)]))
    before = [each.clone() for each in model.parameters()]
    for number, (inputs, targets) in enumerate(loader):
        optimizer.zero_grad()
        # The first layer is used by all ranks, the second by rank 0 alone in the first step, the third by none.
        outputs = model[0](inputs) + (model[1](inputs) if run.rank == 0 and number == 0 else 0)
        if not (number == 2 and run.rank):  # without any backward, too
            nn.functional.cross_entropy(outputs, targets).backward()
        optimizer.step()
        assert (model[1].weight.grad is not None) == (number == 0)
        assert model[2].weight.grad is None
    runtime.assert_weights_in_sync(model)
    assert all(torch.equal(*pair) for pair in zip(before[4:], list(model.parameters())[4:], strict=True))


@pytest.mark.ranks(2, framework="torch")
def test_a_gradient_that_is_completed_twice_is_an_error() -> None:
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    _, model, _, loader = prepared(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 3)]))
    inputs, targets = next(iter(loader))
    hidden = inputs.requires_grad_()
    for _ in range(2):  # a shared layer
        hidden = checkpoint(model[0], hidden, use_reentrant=True)
    with pytest.raises(TrainingError, match=r"use_reentrant=False"):
        nn.functional.cross_entropy(model[1](hidden), targets).backward()


@pytest.mark.ranks(2, framework="torch")
def test_mixed_dtypes_extra_state_and_compiled_models(runtime: Any) -> None:
    import torch
    from torch import nn

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"anything": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = build(Extra(16, 16)), nn.Linear(3, 3).to(torch.bfloat16)

        def forward(self, inputs: Any) -> Any:
            return self.head(self.body(inputs.float()).to(torch.bfloat16))

    torch.manual_seed(1)
    run, model, optimizer, loader = prepared(Mixed())
    losses = train(run, torch.compile(model, backend="eager"), optimizer, loader)
    runtime.assert_weights_in_sync(model)
    run.check_in_sync()
    assert len(losses) == 5


@pytest.mark.ranks(2, framework="torch")
def test_rank_0_alone_may_read_a_checkpoint(runtime: Any) -> None:
    from common.torch.script import loop

    import torch

    run = loop.start(seed=1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if run.rank == 0:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
    run.prepare(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
    runtime.assert_weights_in_sync(model)


@pytest.mark.ranks(2, framework="torch")
def test_an_epoch_goes_on_in_its_middle() -> None:
    from torch import nn

    whole = prepared(build(nn.Dropout(0.2)), shuffle=True)
    expected = train(*whole) + train(*whole)
    run, model, optimizer, loader = prepared(build(nn.Dropout(0.2)), shuffle=True)
    losses = train(run, model, optimizer, loader)
    for number, (inputs, targets) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))
        if number == 2:
            state = loader.state_dict()
            break
    saved = [model.state_dict(), optimizer.state_dict(), run.state_dict()]
    run, model, optimizer, loader = prepared(build(nn.Dropout(0.2)), shuffle=True)
    for each, of_one in zip((model, optimizer, run), saved, strict=True):
        each.load_state_dict(of_one)
    loader.load_state_dict(state)
    losses += train(run, model, optimizer, loader)
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.ranks(2, framework="torch")
def test_a_loader_keeps_what_its_author_chose() -> None:
    import torch
    from torch.utils.data import get_worker_info

    class Where(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 13

        def __getitem__(self, number: int) -> Any:
            info = get_worker_info()
            return number, info.seed if info else 0

    from common.torch.script import loop

    from torch.utils.data import DataLoader

    run = loop.start(seed=1)
    author = DataLoader(Where(), batch_size=4, drop_last=True, num_workers=1, persistent_workers=True)
    loader = run.prepare(author)
    epochs = [list(loader) for _ in range(2)]
    assert len(loader) == len(epochs[0]) == 3
    assert len(loader.dataset) == 13
    mine = [number for numbers, _ in epochs[0] for number in numbers.tolist()]
    assert run.sum(sum(mine)) == sum(range(12))
    assert len({int(seed) for epoch in epochs for _, seeds in epoch for seed in seeds}) == 1  # the same worker


@pytest.mark.ranks(3, framework="torch")
def test_a_rank_without_a_row_changes_nothing(runtime: Any) -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    run, model, optimizer, _ = prepared(build(nn.BatchNorm1d(16)))
    loader = run.prepare(DataLoader(data(7), batch_size=6))  # 2 + 2 + 2, then 1 + 0 + 0
    seen = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        before = model[1].running_mean.clone()
        if len(inputs) == 1:
            model.eval()  # statistics of one row have no variance
        nn.functional.cross_entropy(model(inputs), targets).backward()
        model.train()
        optimizer.step()
        seen.append(not torch.equal(before, model[1].running_mean))
    assert seen == [True, False]
    with torch.no_grad():
        assert [len(rows) for rows, _ in loader] == ([2, 1] if run.rank == 0 else [2, 0])
    runtime.assert_weights_in_sync(model)


@pytest.mark.ranks(3, framework="torch")
def test_a_model_that_takes_no_empty_batch_is_evaluated() -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build()

        def forward(self, inputs: Any, targets: Any = None) -> Any:
            outputs = self.body(inputs).view(len(inputs), -1, 3).flatten(1)  # fails for a tensor without elements
            return {
                "outputs": outputs,
                "loss": None if targets is None else nn.functional.cross_entropy(outputs, targets),
            }

    run, model, _, _ = prepared(Heads())
    examples = data(7)  # in batches of 6: 2 + 2 + 2 rows, then 1 + 0 + 0
    loader = run.prepare(DataLoader(examples, batch_size=6))
    of_model = own = 0.0
    num_rows = []
    with torch.no_grad():
        for inputs, targets in loader:
            of_model += model(inputs, targets=targets)["loss"].item() * len(inputs)
            outputs = model(inputs)["outputs"]
            own += (outputs - 1).square().mean().item() * len(inputs)
            num_rows.append(len(outputs))
        whole = model.body(examples.tensors[0])
        expected = [nn.functional.cross_entropy(whole, examples.tensors[1]).item(), (whole - 1).square().mean().item()]
    assert num_rows == ([2, 1] if run.rank == 0 else [2, 0])
    assert [total / 7 for total in run.sum(of_model, own)] == pytest.approx(expected)


@pytest.mark.ranks(2, framework="torch")
def test_an_evaluation_within_an_epoch_changes_nothing() -> None:
    from common.torch.script import part

    import torch
    from torch import nn

    run, model, optimizer, loader = prepared(build())
    expected = train(run, model, optimizer, loader)
    run, model, optimizer, loader = prepared(build())
    losses = []
    for inputs, targets in loader:
        given = part.current()
        with torch.no_grad():
            seen = sum(len(rows) for rows, _ in loader)
        assert part.current() is given
        assert run.sum(seen) == 65
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))
    assert losses == pytest.approx(expected)


@pytest.mark.ranks(2, framework="torch")
def test_two_loaders_of_a_step_have_the_same_parts(capfd: pytest.CaptureFixture[str]) -> None:
    from torch import nn
    from torch.utils.data import DataLoader

    def zipped(size: int) -> list[float]:
        run, model, optimizer, loader = prepared(build())
        losses = []
        for (inputs, targets), (others, _) in zip(
            loader, run.prepare(DataLoader(data(), batch_size=size)), strict=False
        ):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets) + model(others).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(run.mean(loss))
        return losses

    assert len(zipped(16)) == 5
    assert ("give their loaders one batch_size" in refused(capfd, lambda: zipped(5))) == (
        prepared(build())[0].rank == 0
    )


@pytest.mark.ranks(2, framework="torch")
def test_numbers_that_are_drawn_in_place_are_rows_of_the_batch(runtime: Any) -> None:
    import torch

    _, _, _, loader = prepared(build())
    batches = iter(loader)
    inputs, _ = next(batches)
    torch.manual_seed(3)
    of_ranks = runtime.allgather_object(torch.empty_like(inputs).normal_().tolist())
    del batches
    torch.manual_seed(3)
    assert [*of_ranks[0], *of_ranks[1]] == torch.empty(16, 8).normal_().tolist()


@pytest.mark.ranks(2, framework="torch")
def test_a_step_needs_an_exchange() -> None:
    from torch import nn

    run, model, optimizer, loader = prepared(build())
    for inputs, targets in loader:
        with run.no_sync():
            nn.functional.cross_entropy(model(inputs), targets).backward()
        with pytest.raises(TrainingError, match="leave the last one outside"):
            optimizer.step()
        break
    with pytest.raises(TrainingError, match="create_graph=True"):
        nn.functional.cross_entropy(model(inputs), targets).backward(create_graph=True)


@pytest.mark.ranks(2, framework="torch")
def test_dropout_of_pytorchs_own_layers_differs_between_ranks(runtime: Any) -> None:
    import torch
    from torch import nn

    _, model, _, loader = prepared(nn.LSTM(8, 8, num_layers=2, dropout=0.5))
    batches = iter(loader)
    next(batches)
    torch.manual_seed(3)
    drawn = model(torch.ones(5, 1, 8))[0].sum().item()
    of_ranks = runtime.allgather_object([drawn, int(torch.randint(1000, ()))])
    assert of_ranks[0][0] != of_ranks[1][0]
    assert of_ranks[0][1] == of_ranks[1][1]


@pytest.mark.ranks(2, framework="torch")
def test_freezing_keeps_the_residuals_of_other_parameters(runtime: Any) -> None:
    import torch

    options = {"compression": {"name": "topk", "min_numel": 16}}
    run, model, optimizer, loader = prepared(build(), options)
    train(run, model, optimizer, loader)
    before, head = run.state_dict()["0"]["residual"], model[-1].weight.detach().clone()
    model[0].weight.requires_grad = False
    frozen = model[0].weight.detach().clone()
    next(iter(loader))
    assert torch.equal(run.state_dict()["0"]["residual"]["2.weight"], before["2.weight"])
    train(run, model, optimizer, loader)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[-1].weight, head)
    runtime.assert_weights_in_sync(model)


@pytest.mark.ranks(2, framework="torch")
def test_ranks_may_draw_for_their_rows_alone(runtime: Any) -> None:
    import torch
    from torch import nn

    run, model, optimizer, loader = prepared(build(nn.Dropout(0.5)), {"noise": "rank"})
    batches = iter(loader)
    next(batches)
    sums = [nn.functional.dropout(torch.ones(8, 99)), torch.randn(8, 99), torch.rand_like(torch.ones(8, 99))]
    of_ranks = runtime.allgather_object([each.sum().item() for each in sums])
    assert all(mine != other for mine, other in zip(*of_ranks, strict=True))
    train(run, model, optimizer, loader)
    runtime.assert_weights_in_sync(model)


@pytest.mark.ranks(2, framework="torch")
@pytest.mark.parametrize("method", [*compressors.of_scripts(), "adasum"])
def test_gradients_may_be_compressed(method: str, runtime: Any) -> None:
    options = {"op": method} if method == "adasum" else {"compression": {"name": method, "min_numel": 16}}
    run, model, optimizer, loader = prepared(build(), options, shuffle=True)
    losses = [sum(train(run, model, optimizer, loader)) for _ in range(6)]
    assert losses[-1] < losses[0]
    runtime.assert_weights_in_sync(model)
    state = run.state_dict()
    run.load_state_dict(state)
    again = run.state_dict()
    for number, names in state.items():
        for name, tensors in names.items():
            for key, tensor in tensors.items():
                assert again[number][name][key] == pytest.approx(tensor.numpy(), rel=1e-5, abs=1e-7), (name, key)


def test_one_rank_changes_nothing() -> None:
    pytest.importorskip("torch")
    from common.torch.script import loop

    import torch
    from torch.utils.data import DataLoader

    run, model, loader = loop.start(), build(), DataLoader(data(), batch_size=5, shuffle=True)
    assert run.prepare(model) is model
    prepared = run.prepare(loader)
    torch.manual_seed(1)
    expected = [inputs for inputs, _ in loader]
    torch.manual_seed(1)
    assert all(map(torch.equal, [inputs for inputs, _ in prepared], expected))
    assert prepared.state_dict()["num_given"] == 0
    words: Any = ["a", "b", "c"]
    stream = DataLoader(words, batch_size=None)
    assert list(run.prepare(stream)) == ["a", "b", "c"]
    assert run.mean(1.5) == run.sum(1.5) == 1.5


@pytest.mark.ranks(2, framework="torch")
def test_means_are_those_of_the_exchange(runtime: Any) -> None:
    from common.torch.script import loop

    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy  # imported by name, before the run starts
    from torch.utils.data import DataLoader, TensorDataset

    inputs, targets = data()[:]
    counted = torch.where(torch.arange(65) % 5 < 3, targets, -1)
    run = loop.start(seed=1)
    model = run.prepare(build())
    for rows, wanted in run.prepare(DataLoader(TensorDataset(inputs, counted), batch_size=65)):
        loss = cross_entropy(model(rows), wanted, None, None, -1)
        loss.backward()
    expected = nn.functional.cross_entropy(model(inputs), counted, ignore_index=-1)
    assert run.mean(loss) == pytest.approx(expected.item(), rel=1e-6)  # after the loop, too
    (alone,) = torch.autograd.grad(expected, model[0].weight)
    torch.testing.assert_close(model[0].weight.grad, alone)


@pytest.mark.ranks(2, framework="torch")
def test_gradients_that_are_not_summed_are_an_error() -> None:
    from common.torch.script import loop

    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    run = loop.start(seed=1, losses="sum")
    model, loose = build(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), loose], lr=0.1)
    model, optimizer, loader = run.prepare(model, optimizer, DataLoader(data(), batch_size=16))
    batches = iter(loader)
    inputs, targets = next(batches)
    nn.functional.cross_entropy(model(inputs) * loose, targets, reduction="sum").backward()
    with pytest.raises(TrainingError, match="a parameter of no prepared model"):
        optimizer.step()
    with pytest.raises(TrainingError, match="losses='sum': gradients are not cleared"):
        nn.functional.cross_entropy(model(inputs), targets, reduction="sum").backward()


@pytest.mark.ranks(2, framework="torch")
def test_what_is_drawn_after_a_loop_is_the_same_on_all_ranks(runtime: Any) -> None:
    import torch

    _, _, _, loader = prepared(build())
    next(iter(loader))
    noise = torch.randn(16, 2).sum().item()
    assert len(set(runtime.allgather_object(noise))) == 1


@pytest.mark.ranks(2, framework="torch")
def test_a_model_may_be_prepared_again(runtime: Any) -> None:
    shared = build()
    prepared(shared)
    expected = train(*prepared(build()))
    assert train(*prepared(shared)) == pytest.approx(expected)
    runtime.assert_weights_in_sync(shared)
