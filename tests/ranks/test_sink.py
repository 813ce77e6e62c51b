"""Where weight gradients go: the sink."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from dist_gpt.parallel.sink import GradSink, use


class TestSink:
    def test_the_first_write_overwrites_and_later_ones_add(self) -> None:
        sink, parameter = GradSink(), Parameter(torch.zeros(2, 3))
        buffer = torch.full((2, 3), math.nan)  # what the step before left
        sink.bind(parameter, buffer)
        assert parameter.grad is buffer
        for step in range(2):
            sink.begin()
            sink.add(parameter, torch.ones(2, 3))
            assert buffer.unique().tolist() == [1.0], step
            sink.add(parameter, torch.full((2, 3), 2.0))
            assert buffer.unique().tolist() == [3.0]

    def test_products(self) -> None:
        sink, parameter = GradSink(), Parameter(torch.zeros(2, 3))
        sink.bind(parameter, torch.full((2, 3), math.nan))
        grad_out, inputs = torch.arange(8.0).view(4, 2), torch.arange(12.0).view(4, 3)
        sink.begin()
        for times in (1, 2, 3):
            sink.add_product(parameter, grad_out, inputs)
            assert parameter.grad is not None and torch.equal(parameter.grad, times * (grad_out.t() @ inputs))

    def test_rows_of_a_lookup(self) -> None:
        sink, parameter = GradSink(), Parameter(torch.zeros(4, 2))
        sink.bind(parameter, torch.full((4, 2), math.nan))
        sink.begin()
        sink.add_rows(parameter, torch.tensor([1, 3, 1]), torch.ones(3, 2))
        assert parameter.grad is not None and parameter.grad[:, 0].tolist() == [0, 2, 0, 1]
        sink.add_rows(parameter, torch.tensor([0]), torch.ones(1, 2))
        assert parameter.grad[:, 0].tolist() == [1, 2, 0, 1]

    def test_a_tied_weight_takes_both_its_gradients(self) -> None:
        """The head's product comes first in the backward, then the lookup adds."""
        sink, parameter = GradSink(), Parameter(torch.zeros(3, 2))
        sink.bind(parameter, torch.full((3, 2), math.nan))
        sink.begin()
        sink.add_product(parameter, torch.ones(4, 3), torch.ones(4, 2))
        sink.add_rows(parameter, torch.tensor([2]), torch.ones(1, 2))
        assert parameter.grad is not None and parameter.grad[:, 0].tolist() == [4, 4, 5]

    def test_unbound_parameters_use_their_grad(self) -> None:
        sink, parameter = GradSink(), Parameter(torch.zeros(3))
        for _ in range(2):
            sink.begin()
            use(parameter, sink).mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
            assert parameter.grad is not None and parameter.grad.tolist() == [1, 2, 3]
        use(parameter, sink).sum().backward()
        assert parameter.grad is not None and parameter.grad.tolist() == [2, 3, 4]

    def test_what_got_no_gradient(self) -> None:
        sink, one, two = GradSink(), Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
        for parameter in (one, two):
            sink.bind(parameter, torch.zeros(1))
        sink.begin()
        sink.add(two, torch.ones(1))
        assert sink.unwritten() == [one]
        sink.begin()
        assert sink.unwritten() == [one, two]

    def test_deferred_jobs_run_in_order_and_once(self) -> None:
        sink, done = GradSink(), list[str]()
        sink.submit(lambda: done.append("now"))
        sink.defer(("layer 1", 0))
        assert sink.deferring
        sink.submit(lambda: done.append("first"))
        sink.submit(lambda: done.append("second"))
        sink.defer(("layer 0", 0))
        sink.submit(lambda: done.append("other"))
        sink.defer(None)
        assert not sink.deferring and done == ["now"]
        sink.submit(lambda: done.append("at once"))
        sink.run(("layer 1", 0))
        assert done == ["now", "at once", "first", "second"]
        with pytest.raises(KeyError):
            sink.run(("layer 1", 0))
        sink.run(("layer 0", 0))
        assert done[-1] == "other"
