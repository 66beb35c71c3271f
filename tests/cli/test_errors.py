from __future__ import annotations

import runpy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from ranks import run_on_ranks
from torch import __file__ as torch_package
from torch.utils.data import DataLoader, Dataset

import lightllm.runs
from lightllm.callbacks import NonFiniteLossError
from lightllm.cli.errors import refusal, run_explained
from lightllm.datamodules import BadRow, Origin, Reading
from lightllm.modules import Schedule


def raised_by(make: Callable[[], object]) -> Exception:
    try:
        make()
    except (ValueError, TypeError, RuntimeError) as error:
        return error
    raise AssertionError("nothing was raised")


def refuse() -> NoReturn:
    """A refusal of the package's own; called from here, which is a user's file."""
    Reading(limit=0).check()
    raise AssertionError


OWN_CODE = "from lightllm.datamodules import Reading\nReading(limit=0).check()\n"
THEIR_CODE = "raise ValueError('a bug')\n"


def without_this_file(error: Exception) -> Exception:
    """The error without the frames of this file, as if the command had been called by the interpreter."""
    traceback = error.__traceback__
    while traceback is not None and Path(traceback.tb_frame.f_code.co_filename) == Path(__file__):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def test_a_refusal_of_the_package_is_told_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    error = without_this_file(raised_by(refuse))
    assert refusal(error) == "reading.limit is 0: it must be positive"

    def verb() -> int:
        raise error

    # Raised again from here, the error has this file in its traceback: a user's, for all the command knows.
    with pytest.raises(ValueError, match="it must be positive"):
        run_explained("lightllm fit", verb)
    assert capsys.readouterr().err == ""
    assert run_explained("lightllm fit", lambda: 0) == 0


def test_an_error_of_a_dataclass_is_a_refusal() -> None:
    error = without_this_file(raised_by(lambda: Schedule(floor=3.0)))
    assert refusal(error) == "floor is a share of the learning rate, between 0 and 1, not 3.0"


@pytest.mark.parametrize("code", [OWN_CODE, THEIR_CODE])
def test_what_goes_through_a_users_file_is_a_fault(code: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(code)
    assert refusal(without_this_file(raised_by(lambda: runpy.run_path(str(tmp_path / "own.py"))))) is None


def test_a_key_error_of_the_package_is_a_fault() -> None:
    error = without_this_file(raised_by(lambda: Reading().cache_root / 3))  # type: ignore[operator]
    assert isinstance(error, TypeError)
    assert refusal(error) is None


def test_lightnings_refusals_and_the_packages_own_exceptions_are_told() -> None:
    assert refusal(MisconfigurationException("no gpu")) == "no gpu"
    stopped = without_this_file(raised_by(lambda: _raise_in_package(NonFiniteLossError("step 3 is not finite"))))
    assert refusal(stopped) == "step 3 is not finite"


def _raise_in_package(error: Exception) -> None:
    code = compile("raise error", str(lightllm.runs.__file__), "exec")
    exec(code, {"error": error})


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), 2), (NonFiniteLossError("no"), 1)])
def test_status_tells_wrong_input_from_a_run_that_had_to_stop(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightllm.cli.errors._is_foreign", lambda file: False)
    assert run_explained("lightllm fit", lambda: _raise_in_package(error)) == status  # type: ignore[arg-type, return-value]
    assert capsys.readouterr().err == "lightllm fit: no\n"


class BadRows(Dataset[Any]):
    """Its worker meets a row that it must refuse."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> NoReturn:
        _raise_in_package(BadRow(Origin("rows.jsonl", 17), "the field 'text' is empty"))
        raise AssertionError


def test_what_a_worker_refuses_is_told_as_it_said_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.cli.errors._is_foreign", lambda file: file == Path("nowhere"))
    loader = DataLoader(BadRows(), batch_size=None, num_workers=1)
    error = without_this_file(raised_by(lambda: list(loader)))
    assert refusal(error) == "rows.jsonl:17: the field 'text' is empty"


def test_what_a_process_of_a_pool_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllm.cli.errors._is_foreign", lambda file: file == Path("nowhere"))
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        error = without_this_file(raised_by(pool.submit(refuse).result))
    assert refusal(error) == "reading.limit is 0: it must be positive"


def error_from(file: Path, says: str) -> Exception:
    code = compile(f"raise RuntimeError({says!r})", str(file), "exec")
    return raised_by(lambda: exec(code))


def told_of_lost_rank(file: Path, says: str) -> bool:
    return "another rank of the run has ended" in (refusal(error_from(file, says)) or "")


@pytest.mark.parametrize("says", ["[Errno 32] Broken pipe", "Connection reset by peer"])
def test_a_lost_connection_is_told_as_a_lost_rank_only_where_there_are_ranks(says: str) -> None:
    torch = Path(torch_package).parent
    assert not told_of_lost_rank(torch / "utils" / "data" / "dataloader.py", says)
    assert not told_of_lost_rank(Path("nowhere/torch/mine.py"), says)
    assert told_of_lost_rank(torch / "distributed" / "rendezvous.py", says)
    for ranks, told in ((1, False), (2, True)):
        assert run_on_ranks(told_of_lost_rank, ranks, torch / "autograd" / "graph.py", says) == [told] * ranks
    assert run_on_ranks(told_of_lost_rank, 2, Path("nowhere/wandb/sdk.py"), says) == [False, False]
