from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from resumable_run import NotingModule, run, same_state, train_loader
from typing_extensions import override

from lightllm.callbacks import Checkpoint, Interrupted, Interruption, RandomState

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


class Signals(Callback):
    """Sends this process a signal in a hook, when so many optimizer steps are done."""

    def __init__(self, signum: int, step: int, hook: str = "on_train_batch_start", times: int = 1) -> None:
        def send(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step and self.left:
                self.left = False
                for _ in range(times):
                    os.kill(os.getpid(), signum)

        self.left = True
        setattr(self, hook, send)


def everything(folder: Path) -> list[Any]:
    return [RandomState(), Interruption(), Checkpoint(every_n_train_steps=1000, dirpath=str(folder / "checkpoints"))]


def interrupted(folder: Path, signals: Callback, **fields: Any) -> tuple[NotingModule, Interrupted]:
    module = NotingModule()
    with pytest.raises(Interrupted) as caught:
        run(folder, [signals, *everything(folder)], module=module, **fields)
    return module, caught.value


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [0, 2, 3, 6])
@pytest.mark.parametrize("validate", [False, True])
def test_finishes_the_step_saves_and_goes_on_exactly(
    tmp_path: Path, signum: signal.Signals, accumulate: int, step: int, validate: bool
) -> None:
    fields: dict[str, Any] = {"accumulate_grad_batches": accumulate, "validate": validate}
    whole = run(tmp_path / "whole", everything(tmp_path / "whole"), **fields)
    part, exception = interrupted(tmp_path, Signals(signum, step), **fields)
    assert exception.code == 128 + signum
    assert exception.checkpoint == tmp_path / "checkpoints" / f"step={step + 1}.ckpt"
    assert part.trainer.global_step == step + 1
    rest = run(tmp_path, everything(tmp_path), resume=exception.checkpoint, **fields)
    assert part.seen + rest.seen == whole.seen
    assert same_state(rest, whole)
    # Nothing was validated that would not have been, and nothing was left out.
    assert part.events + rest.events == whole.events


@pytest.mark.parametrize("step", [3, 6])
def test_breaks_off_a_validation_which_is_run_again(tmp_path: Path, step: int) -> None:
    fields: dict[str, Any] = {"validate": True, "val_check_interval": 3}
    whole = run(tmp_path / "whole", everything(tmp_path / "whole"), **fields)
    part, exception = interrupted(tmp_path, Signals(signal.SIGTERM, step, "on_validation_batch_start"), **fields)
    assert exception.checkpoint == tmp_path / "checkpoints" / f"step={step}.ckpt"
    rest = run(tmp_path, everything(tmp_path), resume=exception.checkpoint, **fields)
    assert part.events + rest.events == whole.events
    assert part.seen + rest.seen == whole.seen
    assert same_state(rest, whole)


def test_says_what_was_saved_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path, Signals(signal.SIGTERM, 2))
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("lightllm: ")]
    assert "SIGTERM: finishing this step" in said[0]
    assert f"saved {tmp_path}/checkpoints/step=3.ckpt" in said[1]
    assert said[2] == f"lightllm: go on with: lightllm fit --resume {tmp_path}"


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    module, exception = interrupted(tmp_path, Signals(signal.SIGINT, 2, times=2))
    assert exception.code == 130
    assert exception.checkpoint is None
    assert module.trainer.global_step == 2
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_before_training_a_signal_stops_at_once(tmp_path: Path) -> None:
    _, exception = interrupted(tmp_path, Signals(signal.SIGTERM, 0, "on_fit_start"))
    assert (exception.code, exception.checkpoint) == (143, None)


def test_without_checkpoint_callback_it_stops_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, [Signals(signal.SIGTERM, 2), Interruption()], enable_checkpointing=False)
    assert caught.value.checkpoint is None


@pytest.mark.parametrize("ending", ["finished", "interrupted", "failed"])
def test_handlers_are_as_before_when_the_run_is_over(tmp_path: Path, ending: str) -> None:
    def own(*_: object) -> None: ...

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    found = {signum: signal.getsignal(signum) for signum in signals}
    signal.signal(signal.SIGTERM, own)
    expected = {**found, signal.SIGTERM: own}
    interruption = Interruption()
    callbacks = [RandomState(), interruption, Checkpoint()]
    try:
        if ending == "finished":
            run(tmp_path, callbacks, max_epochs=1)
        elif ending == "interrupted":
            with pytest.raises(Interrupted):
                run(tmp_path, [Signals(signal.SIGTERM, 2), *callbacks])
        else:
            with pytest.raises(ZeroDivisionError):
                run(tmp_path, [Fails(), *callbacks])
        assert {signum: signal.getsignal(signum) for signum in signals} == expected
        assert interruption.exit_code == (143 if ending == "interrupted" else 0)
    finally:
        for signum, handler in found.items():
            signal.signal(signum, handler)


class Fails(Callback):
    """A fault of somebody else's."""

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        raise ZeroDivisionError


def test_other_threads_leave_signals_alone(tmp_path: Path) -> None:
    found = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run, args=(tmp_path, [Interruption(), Checkpoint()]), kwargs={"max_epochs": 1})
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is found
    assert (tmp_path / "checkpoints" / "step=7.ckpt").is_file()


class Slow(Callback):
    """Says when training has begun, and takes its time."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.mark.touch()
        time.sleep(0.05)


def group_leader(folder: Path) -> None:
    os.setpgrp()
    slow = Slow(folder / "mark")
    run(folder, [slow, *everything(folder)], loader=train_loader(workers=2), max_epochs=50)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_group_with_workers(tmp_path: Path, signum: signal.Signals) -> None:
    """A terminal's Ctrl-C, `timeout` and batch systems signal the workers of the data loader too."""
    process = get_context("fork").Process(target=group_leader, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "mark").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid or 0, signum)
    process.join(30)
    assert process.exitcode == 128 + signum
    saved = list((tmp_path / "checkpoints").glob("step=*.ckpt"))
    assert len(saved) == 1
    step = int(saved[0].stem.split("=")[1])
    loader = train_loader(workers=2)
    resumed = run(tmp_path, everything(tmp_path), resume=saved[0], max_epochs=3, loader=loader)
    whole = run(tmp_path / "whole", everything(tmp_path / "whole"), max_epochs=3)
    assert resumed.seen == whole.seen[step:]
    assert same_state(resumed, whole)
