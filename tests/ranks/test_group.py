"""Groups, their collectives on gloo, what the ledger counts, and the mesh. All values are small integers: exact."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm.group import Group, Pending
from dist_gpt.comm.ledger import MAX_DIFFERENCES, Ledger
from dist_gpt.comm.mesh import Backends, FakeBackends, build_mesh, edges_of
from dist_gpt.events import wire_bytes
from dist_gpt.layout import Layout
from tests.ranks.threads import on_gloo, on_groups

SIZES = (2, 3)
Body = Callable[[Group], Any]
Everyone = Callable[[int, Body], list[Any]]


@pytest.fixture(params=[True, False], ids=["read", "sent"])
def everyone(request: pytest.FixtureRequest) -> Everyone:
    """on_groups, by reading each other's memory and by gloo."""
    return partial(on_groups, single_copy=request.param)


def alone() -> Group:
    return Group("tp", (5,), 5, None, Ledger({"tp": 1}))


def fake(size: int) -> Group:
    ranks = tuple(range(size))
    return Group("tp", ranks, 1, FakeBackends().create("tp", ranks, 1), Ledger({"tp": size}))


def control(group: Group) -> dict[str, dict[str, int]]:
    """What the group's ledger counted outside of steps, by op."""
    counts: dict[str, dict[str, int]] = group.ledger.counts("control").as_dict().get("tp", {})
    return counts


def tally(calls: int, payload: int, wire: int) -> dict[str, int]:
    return {"calls": calls, "payload_bytes": payload, "wire_bytes": wire}


def values(tensor: Tensor) -> list[float]:
    flat: list[float] = tensor.flatten().tolist()
    return flat


class TestAlone:
    """A group of one rank is the identity and leaves no trace."""

    def test_every_collective(self) -> None:
        group = alone()
        x = torch.arange(4.0)
        out = torch.zeros(4)
        for pending in (group.all_reduce(x), group.all_reduce(x, "max"), group.broadcast(x)):
            assert pending.done()
            pending.wait()
        group.barrier()
        assert values(x) == [0, 1, 2, 3]
        group.all_gather(out, x).wait()
        assert values(out) == [0, 1, 2, 3]
        group.reduce_scatter(out, 2 * x).wait()
        assert values(out) == [0, 2, 4, 6]
        assert control(group) == {}

    def test_in_place(self) -> None:
        group, x = alone(), torch.arange(4.0)
        group.all_gather(x, x).wait()
        group.reduce_scatter(x, x).wait()
        assert values(x) == [0, 1, 2, 3]

    def test_several_ranks_need_a_backend(self) -> None:
        with pytest.raises(ValueError, match=r"group tp \(0, 1\): no backend for 2 ranks"):
            Group("tp", (0, 1), 0, None, Ledger({"tp": 2}))

    def test_size_and_index(self) -> None:
        assert (alone().size, alone().index, fake(3).size, fake(3).index) == (1, 0, 3, 1)


@pytest.mark.parametrize("size", SIZES)
class TestGloo:
    def test_all_reduce(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            x = torch.tensor([1.0, 10.0, -1.0], dtype=torch.float64) * (group.index + 1)
            largest = x.clone()
            group.all_reduce(x).wait()
            group.all_reduce(largest, "max").wait()
            return values(x), values(largest), control(group)

        total = size * (size + 1) // 2
        ring = 24 * 2 * (size - 1) // size  # 2(n-1)/n of 24 bytes
        counted = {"all_reduce": tally(2, 48, 2 * ring)}
        assert everyone(size, body) == [([total, 10 * total, -total], [size, 10 * size, -1], counted)] * size

    def test_all_gather(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            mine = torch.tensor([[1.0, 2.0]]) + 10 * group.index
            out = torch.empty(size, 2)
            group.all_gather(out, mine).wait()
            return values(out), control(group)

        expected = [value + 10 * rank for rank in range(size) for value in (1.0, 2.0)]
        counted = {"all_gather": tally(1, 8 * size, 8 * (size - 1))}
        assert everyone(size, body) == [(expected, counted)] * size

    def test_all_gather_in_place_in_a_view_of_a_buffer(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            buffer = torch.full((2 + 3 * size,), -1.0)
            out = buffer[1:-1]
            shard = out[3 * group.index : 3 * group.index + 3]
            shard.copy_(torch.arange(3.0) + 10 * group.index)
            group.all_gather(out, shard).wait()
            return values(buffer)

        inside = [value + 10.0 * rank for rank in range(size) for value in range(3)]
        assert everyone(size, body) == [[-1.0, *inside, -1.0]] * size

    def test_reduce_scatter(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            full = torch.arange(2.0 * size) + 100 * group.index
            kept = full.clone()
            out = torch.empty(2)
            group.reduce_scatter(out, full).wait()
            assert torch.equal(full, kept), "the input is not scratch when the output is elsewhere"
            return values(out), control(group)

        extra = 100 * size * (size - 1) // 2
        counted = {"reduce_scatter": tally(1, 8 * size, 8 * (size - 1))}
        expected = [([size * (2.0 * r) + extra, size * (2.0 * r + 1) + extra], counted) for r in range(size)]
        assert everyone(size, body) == expected

    def test_reduce_scatter_in_place_in_a_view_of_a_buffer(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            buffer = torch.full((2 + 2 * size,), -1.0)
            full = buffer[1:-1]
            full.copy_(torch.arange(2.0 * size) * (group.index + 1))
            shard = full[2 * group.index : 2 * group.index + 2]
            group.reduce_scatter(shard, full).wait()
            return values(shard), buffer[0].item(), buffer[-1].item()

        total = size * (size + 1) / 2
        assert everyone(size, body) == [([2 * r * total, (2 * r + 1) * total], -1.0, -1.0) for r in range(size)]

    def test_a_gather_undoes_a_scatter_of_rows(self, size: int, everyone: Everyone) -> None:
        """Along dim 0, for the (tokens, hidden) activations of sequence parallel."""

        def body(group: Group) -> Any:
            full = torch.arange(12.0 * size).view(4 * size, 3)
            shard, out = torch.empty(4, 3), torch.empty_like(full)
            group.reduce_scatter(shard, full).wait()
            group.all_gather(out, shard).wait()
            return torch.equal(out, size * full)

        assert all(everyone(size, body))

    def test_broadcast(self, size: int, everyone: Everyone) -> None:
        def body(group: Group) -> Any:
            x = torch.full((2,), float(group.index))
            group.broadcast(x, root=size - 1).wait()
            return values(x), control(group)

        counted = {"broadcast": tally(1, 8, 8 * (size - 1) // size)}
        assert everyone(size, body) == [([size - 1.0] * 2, counted)] * size

    def test_barrier_waits_and_moves_nothing(self, size: int, everyone: Everyone) -> None:
        here: list[int] = []

        def body(group: Group) -> Any:
            time.sleep(0.05 * group.index)
            here.append(group.index)
            group.barrier()
            return len(here), control(group)

        assert everyone(size, body) == [(size, {"barrier": tally(1, 0, 0)})] * size

    def test_several_under_way(self, size: int, everyone: Everyone) -> None:
        """Issued together, waited for in another order: each result is its own."""

        def body(group: Group) -> Any:
            tensors = [torch.full((1000,), float(i + group.index)) for i in range(6)]
            pending = [group.all_reduce(t) for t in tensors]
            for one in reversed(pending):
                one.wait()
            return [t.unique().tolist() for t in tensors]

        extra = size * (size - 1) / 2
        assert everyone(size, body) == [[[i * size + extra] for i in range(6)]] * size


class TestPair:
    def test_messages_arrive_in_order(self) -> None:
        def body(group: Group) -> Any:
            if group.index == 0:
                tensors = [torch.full((3,), float(i)) for i in range(4)]
                pending = [group.send(t) for t in tensors]
            else:
                tensors = [torch.empty(3) for _ in range(4)]
                pending = [group.recv(t) for t in tensors]
            for one in pending:
                one.wait()
            return [t[0].item() for t in tensors], control(group)

        sent, received = on_groups(2, body)
        assert sent == ([0, 1, 2, 3], {"send": tally(4, 48, 48)})
        assert received == ([0, 1, 2, 3], {"recv": tally(4, 0, 0)})


class TestPending:
    def test_finish_runs_once_and_after_the_backend(self) -> None:
        order: list[str] = []

        class Work:
            def wait(self) -> None:
                order.append("backend")

            def is_completed(self) -> bool:
                return bool(order)

        pending = Pending(Work(), lambda: order.append("finish"))
        assert not pending.done()
        pending.wait()
        pending.wait()
        assert order == ["backend", "finish"] and pending.done()


class TestLedger:
    def test_exact(self) -> None:
        group = fake(4)
        x = torch.zeros(6)
        with group.ledger.step("train", "F0", {("tp", "all_reduce", 24): 2}):
            group.all_reduce(x)
            group.all_reduce(x)
        assert group.ledger.exact
        assert group.ledger.counts("train").as_dict() == {"tp": {"all_reduce": tally(2, 48, 72)}}
        assert control(group) == {}

    @pytest.mark.parametrize(
        ("declared", "issued", "words"),
        [
            (1, 0, "train, B3, layer 7: 1 fewer tp all_reduce of 24 bytes than declared"),
            (0, 2, "train, B3, layer 7: 2 more tp all_reduce of 24 bytes than declared"),
            (3, 1, "train, B3, layer 7: 2 fewer tp all_reduce of 24 bytes than declared"),
        ],
    )
    def test_a_difference_names_the_step(self, declared: int, issued: int, words: str) -> None:
        group = fake(2)
        calls = {("tp", "all_reduce", 24): declared} if declared else {}
        with group.ledger.step("train", "F0", {}):
            pass
        with group.ledger.step("train", "B3, layer 7", calls):
            for _ in range(issued):
                group.all_reduce(torch.zeros(6))
        with group.ledger.step("train", "W0", {}):
            pass
        assert group.ledger.differences == [words]

    def test_another_size_or_op_is_a_difference(self) -> None:
        group = fake(2)
        with group.ledger.step("eval", "F1", {("tp", "all_gather", 32): 1}):
            group.all_gather(torch.zeros(4), torch.zeros(2))
        assert sorted(group.ledger.differences) == [
            "eval, F1: 1 fewer tp all_gather of 32 bytes than declared",
            "eval, F1: 1 more tp all_gather of 16 bytes than declared",
        ]

    def test_aside_is_control_traffic(self) -> None:
        group = fake(2)
        with group.ledger.step("train", "STEP", {("tp", "all_reduce", 4): 1}):
            with group.ledger.aside():
                group.broadcast(torch.zeros(8))
            group.all_reduce(torch.zeros(1))
        assert group.ledger.exact
        assert control(group) == {"broadcast": tally(1, 32, 16)}

    def test_a_step_that_raises_is_not_compared_and_ends(self) -> None:
        group = fake(2)
        with pytest.raises(ZeroDivisionError), group.ledger.step("train", "F0", {("tp", "all_reduce", 4): 1}):
            raise ZeroDivisionError
        group.all_reduce(torch.zeros(1))
        assert group.ledger.exact
        assert control(group) == {"all_reduce": tally(1, 4, 4)}

    def test_the_list_of_differences_ends(self) -> None:
        ledger = Ledger({"tp": 2})
        for step in range(3 * MAX_DIFFERENCES):
            with ledger.step("train", step, {("tp", "all_reduce", 4): 1}):
                pass
        assert len(ledger.differences) == MAX_DIFFERENCES and not ledger.exact
        assert ledger.differences[0].startswith("train, 0: ")

    def test_wire_bytes_are_rounded_down_per_call(self) -> None:
        group = fake(3)
        for _ in range(2):
            group.all_reduce(torch.zeros(5, dtype=torch.uint8))  # 4/3 of 5 = 6.67
        assert control(group) == {"all_reduce": tally(2, 10, 12)}
        assert wire_bytes("all_gather", 4, 3) == 2  # 2/3 of 4 = 2.67; as a call such parts are refused


class TestFake:
    def test_returns_at_once_and_counts(self) -> None:
        """Also on meta tensors, which hold no values."""
        group = fake(8)
        for device in ("cpu", "meta"):
            full, part = torch.ones(16, device=device), torch.ones(2, device=device)
            for pending in (
                group.all_reduce(full),
                group.all_gather(full, part),
                group.reduce_scatter(part, full),
                group.broadcast(full),
            ):
                pending.wait()
        assert control(group) == {
            "all_reduce": tally(2, 128, 224),
            "all_gather": tally(2, 128, 112),
            "reduce_scatter": tally(2, 128, 112),
            "broadcast": tally(2, 128, 112),
        }


class TestMesh:
    def test_groups_of_one_rank_of_thousands(self) -> None:
        """Creation is by members only: a backend is asked for only what the rank is in, whatever the world."""
        layout = Layout(pp=12, dp=32, cp=1, tp=8)
        assert layout.world == 3072
        created: list[tuple[int, ...]] = []

        class Noting(FakeBackends):
            def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
                created.append(ranks)
                return super().create(name, ranks, rank)

        mesh = build_mesh(layout, 0, range(12), Noting())
        assert len(created) == 6 and all(0 in ranks for ranks in created)  # four axes and two edges
        assert {axis: group.size for axis, group in mesh.groups.items()} == {
            "world": 3072, "data": 32, "embed": 2, "tp": 8,
        }  # fmt: skip
        assert mesh.tp.ranks == tuple(range(8))
        assert mesh["embed"].ranks == (0, 11 * 256)
        assert sorted(mesh.edges) == [(0, 1, "f"), (1, 0, "b")]
        assert mesh.edge(0, 1, "f").ranks == (0, 256)

    def test_groups_of_a_world_of_data_ranks(self) -> None:
        mesh = build_mesh(Layout(dp=3072), 7, [0], FakeBackends())
        assert mesh.world.ranks == mesh.data.ranks == tuple(range(3072))
        assert mesh.tp.ranks == mesh["embed"].ranks == (7,)
        assert mesh.edges == {}

    @pytest.mark.parametrize(
        ("holders", "pp", "expected"),
        [
            ([0], 0, []),
            ([0, 1], 1, [(0, 1, "f"), (1, 0, "b")]),
            ([0, 1, 2], 1, [(0, 1, "f"), (1, 0, "b"), (1, 2, "f"), (2, 1, "b")]),
            ([0, 1, 0, 1], 0, [(0, 1, "b"), (0, 1, "f"), (1, 0, "b"), (1, 0, "f")]),
            ([0, 1, 1, 0], 0, [(0, 1, "b"), (0, 1, "f"), (1, 0, "b"), (1, 0, "f")]),
        ],
    )
    def test_edges(self, holders: list[int], pp: int, expected: list[tuple[int, int, str]]) -> None:
        assert edges_of(holders, pp) == expected

    def test_each_group_meets_its_own_ranks(self) -> None:
        """pp 2 x dp 2 on gloo: sums along each axis show who took part; close gives every backend back."""
        layout = Layout(pp=2, dp=2)

        def body(rank: int, backends: Backends) -> Any:
            mesh = build_mesh(layout, rank, range(2), backends)
            sums = {}
            for axis, group in mesh.groups.items():
                x = torch.tensor([10.0**rank])
                group.all_reduce(x).wait()
                sums[axis] = x.item()
            passed = torch.tensor([float(rank)])
            forth = mesh.edge(0, 1, "f")
            (forth.send(passed) if mesh.coords.pp == 0 else forth.recv(passed)).wait()
            mesh.world.barrier()
            mesh.close()
            assert all(group.backend is None for group in [*mesh.groups.values(), *mesh.edges.values()])
            return sums["world"], sums["data"], sums["embed"], sums["tp"], passed.item()

        assert on_gloo(4, body) == [
            (1111, 11, 101, 1, 0),
            (1111, 11, 1010, 10, 1),
            (1111, 1100, 101, 100, 0),
            (1111, 1100, 1010, 1000, 1),
        ]
