"""What libraries say and no user needs: each message by its own words, so that whatever else they say is heard."""

from __future__ import annotations

import logging
import re
import warnings

REMARKS = {
    "lightning.fabric.utilities.seed": r"Seed set to",
    # The command itself says from which checkpoint, and when the run is over.
    "lightning.pytorch.utilities.rank_zero": (
        r"GPU available: False|TPU available: False|💡 Tip|`Trainer\.fit` stopped: `max_(steps|epochs)="
        r"|Restoring states from|Restored all states from|Loaded model weights from"
        r"|`Trainer\(val_check_interval=1\.0\)` was configured"
    ),
    # Optional kernels that this machine has no use for.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community",
    "torchao": r"Failed to load .*\.so",
    "torch.utils._pytree": r"<enum '\w+'> is an Enum subclass and is now natively supported",
}
"""Log messages that are dropped: the logger, and what the message begins with."""

WARNINGS = (
    # Peft asks transformers, and Lightning and torchdata ask torch, in ways that are being retired.
    (r".is_gradient_checkpointing. is deprecated", FutureWarning),
    (r".isinstance\(treespec, LeafSpec\). is deprecated", FutureWarning),
    (r"'set_vital' is deprecated", UserWarning),
    # Lightning and we call jsonargparse by names that the oldest one that we admit knows too.
    (r"\s*By default only one JsonargparseDeprecationWarning", DeprecationWarning),
    (r"\s*(``instantiate_classes``|skip_none parameter) was deprecated", DeprecationWarning),
    # Its batches come ready from memory, and the run says itself if it waits for data (throughput/data_seconds).
    (r"The '\w+' does not have many workers", UserWarning),
    # A resumed run, and a measured one, have their folder already.
    (r"Checkpoint directory .* exists and is not empty", UserWarning),
    (r"The number of training batches \(\d+\) is smaller than the logging interval", UserWarning),
)
"""Warnings that are dropped: what the message begins with, and the category."""


def quiet_libraries() -> None:
    """Drop the messages above from now on; imports nothing, so it can come before every library."""
    for name, beginning in REMARKS.items():
        remark = _Remark(beginning)
        if remark not in logging.getLogger(name).filters:
            logging.getLogger(name).addFilter(remark)
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message, category)


class _Remark(logging.Filter):
    """Lets everything pass but what begins so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remark) and other.beginning == self.beginning

    def __hash__(self) -> int:
        return hash(self.beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return re.match(self.beginning, record.getMessage()) is None
