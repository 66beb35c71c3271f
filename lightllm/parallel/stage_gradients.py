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
        data: The ranks that have the same weights and take other batches; None if the mean over them is formed already.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shared: Sequence[nn.Parameter],
        other: int,
        pipeline: ProcessGroup,
        data: ProcessGroup | None,
    ) -> None:
        self._parameters = list(parameters)
        self._shared = list(shared)
        self._other = other
        self._pipeline = pipeline
        self._data = data
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._earlier: dict[nn.Parameter, Tensor] = {}

    def begin(self, first: bool) -> None:
        """Clear the gradients for a schedule; those of the same optimizer step are remembered.

        Args:
            first: Whether an optimizer step begins, so that what is there is of the one before.
        """
        if not first:
            self._earlier = {one: one.grad for one in self._parameters if one.grad is not None}
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def put_aside(self) -> None:
        """Take what the schedule formed off the parameters, added to what was there before it, until `give_back`."""
        for parameter in self._parameters:
            gradient, earlier = parameter.grad, self._earlier.pop(parameter, None)
            if gradient is not None and earlier is not None:
                gradient += earlier
            gradient = earlier if gradient is None else gradient
            if gradient is not None:
                self._aside.append((parameter, gradient))
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
        num_data_ranks = 1 if self._data is None else torch.distributed.get_world_size(self._data)
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
