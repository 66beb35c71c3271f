"""The command in this process: a small network and a few chats for it to train on, in a folder of its own."""

from __future__ import annotations

import json
import sys
import warnings
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_llama, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.cli import main

QUESTIONS = ["What is a whale?", "Who is Ishmael?", "What does f(x) return?", "Where is the sea?"]
ANSWERS = ["A mighty thing.", "The one who tells.", "x ** 2, squared.", "Everywhere."]


def save_small_network(folder: Path) -> Path:
    """A llama of two layers with 1024 positions, and its tokenizer, as transformers saves them."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    fields = tiny_llama(len(tokenizer)).config.to_dict()
    LlamaForCausalLM(LlamaConfig(**{**fields, "max_position_embeddings": 1024})).save_pretrained(folder)
    return folder


def save_chats(file: Path, count: int) -> Path:
    """Questions and answers, one a line."""
    rows = []
    for index in range(count):
        question, answer = QUESTIONS[index % 4], ANSWERS[(index + index // 4) % 4]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(rows))
    return file


def settle_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in `folder`: relative paths, own modules and the cache are there."""
    folder.mkdir(parents=True, exist_ok=True)
    patch.chdir(folder)
    patch.setenv("LIGHTLLM_CACHE", str(folder / "cache"))
    patch.setattr(sys, "path", [one for one in sys.path if one])


def lightllm(*arguments: object) -> None:
    """Run a command that must end well."""
    assert main([str(argument) for argument in arguments]) == 0


def forked_lightllm(*arguments: object) -> BaseProcess:
    """Run a command in a forked process, which saves the imports; its exit code is the command's."""

    def run() -> None:
        warnings.simplefilter("ignore")  # as for a user: pytest makes errors of what libraries retire
        sys.exit(main([str(argument) for argument in arguments]))

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must refuse; what it says."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.strip()
