"""What a rank says when another one is gone: not what a library says of a socket, but what happened and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "timed out waiting",
    "nccl communicator was aborted",
    "remote process has exited",
    "socket timeout",
)
"""Parts of what gloo and NCCL say when the other end does not answer any more."""


class LostRankError(RuntimeError):
    """Another rank of the run has died, or does not answer."""


@contextmanager
def noticing_lost_ranks() -> Iterator[None]:
    """Say clearly, of an error of communication within the context, that another rank is gone.

    Raises:
        LostRankError: One is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or not is_loss(error):
            raise
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        raise LostRankError(
            f"rank {rank} stops, because another rank of the run has died or does not answer any more: what it said "
            "last tells why (nothing, if it was killed, for instance because memory ran out). Go on from the last "
            "checkpoint with lightllm fit --resume RUN"
        ) from error


def is_loss(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is of communication with a rank that is gone."""
    found: BaseException | None = error
    while found is not None:
        if any(sign in str(found).lower() for sign in _SIGNS):
            return True
        found = found.__cause__ or found.__context__
    return False
