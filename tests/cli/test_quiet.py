from __future__ import annotations

import logging
import warnings

import pytest

from lightllm.cli.quiet import REMARKS, quiet_libraries


def passes(logger: str, message: str) -> bool:
    record = logging.LogRecord(logger, logging.INFO, "file.py", 1, message, (), None)
    return bool(logging.getLogger(logger).filter(record))


@pytest.mark.parametrize(
    ("logger", "message", "heard"),
    [
        ("lightning.pytorch.utilities.rank_zero", "💡 Tip: For seamless cloud logging", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available: False, used: False", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available: True (cuda), used: False", True),
        ("lightning.pytorch.utilities.rank_zero", "`Trainer.fit` stopped: `max_steps=4` reached.", False),
        ("lightning.pytorch.utilities.rank_zero", "`Trainer.fit` stopped: No training batches.", True),
        ("lightning.pytorch.utilities.rank_zero", "`Trainer(val_check_interval=1.0)` was configured so", False),
        ("lightning.fabric.utilities.seed", "Seed set to 1", False),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: x", False),
        ("bitsandbytes.backends.cpu.ops", "Failed to load something else", True),
    ],
)
def test_remarks_are_dropped_by_their_own_words(logger: str, message: str, heard: bool) -> None:
    quiet_libraries()
    assert passes(logger, message) == heard


def test_warnings_are_dropped_by_their_own_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_libraries()
        warnings.warn("`is_gradient_checkpointing` is deprecated, and more", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning):
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)


def test_being_quiet_twice_is_being_quiet_once() -> None:
    with warnings.catch_warnings():
        quiet_libraries()
        before = {name: len(logging.getLogger(name).filters) for name in REMARKS}
        quiet_libraries()
        assert {name: len(logging.getLogger(name).filters) for name in REMARKS} == before
