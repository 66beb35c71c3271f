"""Ctrl-C and SIGTERM finish the step, save, and say how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightllm.callbacks.checkpoint import Checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """The run was interrupted; if nobody catches it, the process ends with status 128 + the signal's number.

    Args:
        signum: The signal.
        checkpoint: What was saved; None if nothing was.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.checkpoint = checkpoint


class Interruption(Callback):
    """On SIGTERM or Ctrl-C, finishes the optimizer step, saves through the `Checkpoint` callback, and stops.

    It stops by raising `Interrupted`. A second Ctrl-C stops at once, without saving; so does either signal before
    training has started. With several ranks, it is enough that one gets the signal. Signals are handled in the main
    thread only, and as before once the run is over.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        """128 + the number of the signal that stopped the run; 0 if none did."""
        self._received: int | None = None
        self._training = False
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._received, self._training, self._process = None, False, os.getpid()
            # Before the data loader's workers start: they inherit this handler, which leaves them at work on Ctrl-C.
            self._install()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()  # again: Lightning has put its own handler of SIGTERM first, which stops amid an accumulation
        self._training = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_received(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Ranks may have unequal numbers of validation batches, so they can't agree here.
        if self._training and trainer.world_size == 1:
            self._stop_if_received(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._uninstall(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._uninstall(trainer)
        if isinstance(exception, Interrupted):
            self.exit_code = int(exception.code or 0)

    def _stop_if_received(self, trainer: Trainer) -> None:
        received = self._received or 0
        if trainer.world_size > 1:
            anywhere = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(anywhere, reduce_op="max"))
        if not received:
            return
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
        if checkpoints:
            checkpoints[0].request(lambda path: self._stop(trainer, received, path))
        else:
            self._stop(trainer, received, None)

    def _stop(self, trainer: Trainer, signum: int, checkpoint: Path | None) -> None:
        saved = f"saved {checkpoint}" if checkpoint is not None else "nothing saved: there is no Checkpoint callback"
        _say(f"{signal.Signals(signum).name} after step {trainer.global_step}: {saved}")
        if checkpoint is not None:
            _say(f"go on with: lightllm fit --resume {trainer.default_root_dir}")
        raise Interrupted(signum, checkpoint)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data loader: the process that started it decides
            return
        if not self._training or (self._received is not None and signum == signal.SIGINT):
            raise Interrupted(signum)
        self._received = signum
        _say(f"{signal.Signals(signum).name}: finishing this step, then saving. Ctrl-C (again) stops at once.")
        if signum == signal.SIGTERM and sys.platform != "win32":
            # It may have gone to the workers too. That they are gone is no reason to break off: the step has its batch.
            self._previous.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, _ignore))

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                previous = signal.signal(signum, self._handle)
                self._previous.setdefault(signum, previous)

    def _uninstall(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
            # After a failure Lightning puts back what it found, which was ours.
            trainer._signal_connector._original_handlers.update(self._previous)
        self._previous = {}
        self._training = False


@rank_zero_only
def _say(line: str) -> None:
    print(f"lightllm: {line}", file=sys.stderr, flush=True)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN, leaves the children's exit status to be asked for."""
