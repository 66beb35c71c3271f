from __future__ import annotations

import importlib.util
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from chat_tokenizer import byte_tokenizer

from lightllm.datamodules.fingerprint import digest_of, encoding_digest, tokenizer_digest


@dataclass
class Base:
    common: int = 1


@dataclass
class Sub(Base):
    field: str = "text"

    def encode(self) -> str:
        return self.field


def test_equal_values_have_equal_digests() -> None:
    assert digest_of({"a": [1, None], "b": "ü"}) == digest_of({"b": "ü", "a": [1, None]})
    assert digest_of([1, 2]) != digest_of([2, 1])
    assert digest_of(Sub()) == digest_of(Sub()) != digest_of(Sub(field="body"))


def test_tokenizer_digest_sees_what_changes_the_output_and_not_what_calls_leave_behind() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    assert tokenizer_digest(byte_tokenizer()) == before
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    changed = [byte_tokenizer(chat_template="{{ messages }}"), byte_tokenizer(), byte_tokenizer()]
    changed[1].add_tokens(["new"])
    changed[2].eos_token = "<|im_end|>"
    digests = {tokenizer_digest(one) for one in changed}
    assert len(digests) == 3
    assert before not in digests


def test_encoding_digest_sees_added_fields_and_the_tokenizer_but_no_common_ones() -> None:
    tokenizer = byte_tokenizer()
    digest = encoding_digest(Sub(), Base, tokenizer)
    assert encoding_digest(Sub(common=7), Base, tokenizer) == digest
    assert encoding_digest(Sub(field="body"), Base, tokenizer) != digest
    other = deepcopy(tokenizer)
    other.add_tokens(["new"])
    assert encoding_digest(Sub(), Base, other) != digest


def load(path: Path, content: str) -> ModuleType:
    path.write_text(content)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_encoding_digest_sees_a_changed_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    tokenizer, code = byte_tokenizer(), "class Mine(Base):\n    def encode(self):\n        return {}\n"
    header = f"import sys\nBase = sys.modules[{__name__!r}].Base\n"
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or ModuleType(__name__))
    sys.modules[__name__].Base = Base  # type: ignore[attr-defined]
    digests = [
        encoding_digest(load(tmp_path / "mine.py", header + code.format(value)).Mine(), Base, tokenizer)
        for value in (1, 2, 1)
    ]
    assert digests[0] == digests[2] != digests[1]


def test_class_of_a_session_is_told_by_its_methods() -> None:
    tokenizer, digests = byte_tokenizer(), []
    for value in (1, 2, 1):
        namespace: dict[str, type] = {"Base": Base}
        exec(f"class Mine(Base):\n    def encode(self):\n        return {value}\n", namespace)
        digests.append(encoding_digest(namespace["Mine"](), Base, tokenizer))
    assert digests[0] == digests[2] != digests[1]
