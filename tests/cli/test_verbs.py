from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightllm
from lightllm.cli import VERBS, main

HEAVY = {"torch", "lightning", "transformers", "peft", "datasets"}


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {verb} " in told and VERBS[verb].summary in told for verb in VERBS)
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lightllm.__version__


def test_an_unknown_verb_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "no verb 'fti' (did you mean 'fit'?)" in capsys.readouterr().err


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a command has loaded when it ends, in a process of its own."""
    code = f"""
import sys
from lightllm.cli import main
try:
    main({list(arguments)})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize("verb", ["generate", "chat", "export", "quantize", "compress-report", "configs"])
def test_help_of_the_plain_verbs_loads_nothing_heavy(verb: str) -> None:
    assert not HEAVY & loaded_by(verb, "--help")


def test_help_and_the_list_of_configurations_load_nothing_heavy() -> None:
    assert not HEAVY & loaded_by("--help")
    assert not HEAVY & loaded_by("configs")


def test_help_of_fit_loads_no_more_than_it_needs() -> None:
    assert not {"peft", "bitsandbytes", "datasets", "wandb.sdk"} & loaded_by("fit", "--help")


def test_modules_in_the_current_folder_are_found_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/somewhere"])
    for _ in range(2):
        assert main(["configs"]) == 0
    assert sys.path == ["/somewhere", str(tmp_path)]
