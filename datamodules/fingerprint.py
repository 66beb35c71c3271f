"""Digests of what tokenised text depends on: the tokenizer, the code, the settings."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import FunctionType

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def digest_of(value: object) -> str:
    """A digest of any value that is made of strings, numbers, lists and dicts; of others, their `repr` counts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that makes a tokenizer's output: vocabulary, rules, special tokens, chat template."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # Truncation and padding are left behind by calls, and asked for with each.
        rules = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            rules = {path.name: path.read_bytes().hex() for path in sorted(Path(folder).iterdir())}
    return digest_of([type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template])


def encoding_digest(owner: object, base: type, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that an object's `encode` may depend on beside the row.

    That is the tokenizer, the public attributes that its class adds to those of `base`, and the code: this package's
    files and those of the classes in between.

    Args:
        owner: An instance of a subclass of `base`.
        base: A dataclass, whose own attributes don't matter.
        tokenizer: The tokenizer.
    """
    known = {field.name for field in fields(base)} | set(vars(LightningDataModule()))
    settings = {name: value for name, value in vars(owner).items() if name not in known and not name.startswith("_")}
    cls = type(owner)
    code = [_code_digest(ancestor) for ancestor in cls.__mro__[: cls.__mro__.index(base)]]
    return digest_of([cls.__qualname__, settings, code, _package_digest(), tokenizer_digest(tokenizer)])


def _code_digest(cls: type) -> str:
    """A digest of the file that a class is in, or, for one of a session without files, of its methods."""
    try:
        file = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        file = None
    if file is not None and Path(file).is_file():
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    codes = [value.__code__ for value in vars(cls).values() if isinstance(value, FunctionType)]
    return digest_of([[code.co_code.hex(), code.co_consts, code.co_names] for code in codes])


@cache
def _package_digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
