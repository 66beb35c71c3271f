"""What becomes of the gradients that a pipeline's schedule leaves, until the optimizer takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


class StageGradients:
    """Gradients of the parameters that a rank has.

    A schedule forms them while Lightning believes it computes a loss, and Lightning clears gradients after that: so
    they are put aside, and given back when it asks for the backward pass. They are of the summed loss; once a step is
    complete, they are multiplied by the gradient of the loss by that sum.

    Args:
        parameters: Those that the rank has.
        shared: Those of them that another stage has too, in the same order there.
        other: The rank within `pipeline` that has that stage.
        pipeline: The ranks of the pipeline.
        data: The ranks that have the same stages and take other batches.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shared: Sequence[nn.Parameter],
        other: int,
        pipeline: ProcessGroup,
        data: ProcessGroup,
    ) -> None:
        self._parameters = list(parameters)
        self._shared = list(shared)
        self._other = other
        self._pipeline = pipeline
        self._data = data
        self._aside: list[tuple[nn.Parameter, Tensor]] = []

    def begin_step(self) -> None:
        """Forget the gradients of the optimizer step before."""
        for parameter in self._parameters:
            parameter.grad = None

    def put_aside(self) -> None:
        """Take the gradients off their parameters, until `give_back`."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._aside.append((parameter, parameter.grad))
                parameter.grad = None

    def give_back(self) -> None:
        """Hang the gradients on their parameters again."""
        for parameter, gradient in self._aside:
            parameter.grad = gradient
        self._aside = []

    @torch.no_grad()
    def complete(self, factor: Tensor) -> None:
        """Make of the sums what a plain data-parallel strategy would have: a mean over data ranks. Every rank calls it.

        Args:
            factor: The gradient of the loss by the sum, a scalar.
        """
        num_data_ranks = torch.distributed.get_world_size(self._data)
        for parameter in self._parameters:
            if parameter.grad is not None:
                _local(parameter.grad).mul_(factor / num_data_ranks)
        self._add_shared()
        if num_data_ranks > 1:
            gradients = [_local(one.grad) for one in self._parameters if one.grad is not None]
            for work in [torch.distributed.all_reduce(one, group=self._data, async_op=True) for one in gradients]:
                assert work is not None
                work.wait()

    def _add_shared(self) -> None:
        """Add what the other stage that has a parameter found for it: both then have the same."""
        for parameter in self._shared:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            mine = _local(parameter.grad)
            theirs = torch.empty_like(mine)
            sent = torch.distributed.isend(mine.contiguous(), group=self._pipeline, group_dst=self._other)
            torch.distributed.recv(theirs, group=self._pipeline, group_src=self._other)
            assert sent is not None
            sent.wait()
            mine += theirs


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
