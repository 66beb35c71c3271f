from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from lightllm.models import Pretrained
from lightllm.modules.teacher_network import build_teacher, check_tokenizers


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_nothing_of_it_trains(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    teacher = build_teacher(Pretrained(str(tmp_path), dtype="bfloat16"), tiny_tokenizer(), packed=True)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert next(teacher.parameters()).dtype == torch.bfloat16


def test_one_that_does_not_keep_documents_apart_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    network = Pretrained(str(tmp_path))
    build_teacher(network, None)
    with pytest.raises(ValueError, match="does not tell packed documents apart"):
        build_teacher(network, None, packed=True)


def test_one_with_more_tokens_of_the_same_tokenizer() -> None:
    more = tiny_tokenizer()
    more.add_tokens(["<one more>"])
    check_tokenizers(tiny_tokenizer(), more)
    check_tokenizers(more, tiny_tokenizer())


def test_one_with_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"token 0 is '<eos>' in the data's tokenizer and '<unk>' in the teacher's"):
        check_tokenizers(tiny_tokenizer(), words())
