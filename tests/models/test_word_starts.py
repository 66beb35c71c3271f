from __future__ import annotations

from tiny_encoders import wordpiece_tokenizer
from tiny_networks import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightllm.models.word_starts import word_starts


def starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, bool]]:
    table, ids = word_starts(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    return [(tokenizer.convert_ids_to_tokens(token), bool(table[token])) for token in ids]


def test_byte_level_tokens_begin_a_word_with_their_space() -> None:
    found = starts(tiny_tokenizer(), " The whale\nwears\ta brow")
    text = "".join(token for token, _ in found)
    begun = [token for token, begins in found if begins]
    assert all(token[0] in "\u0120\u010a\u0109" for token in begun)
    assert len(begun) == sum(text.count(mark) for mark in "\u0120\u010a\u0109") == 5
    assert len(found) > 5


def test_wordpiece_marks_what_goes_on() -> None:
    assert starts(wordpiece_tokenizer(), "w1p2 w3") == [("w1", True), ("##p2", False), ("w3", True)]


def test_sentencepiece_marks_what_begins() -> None:
    vocabulary = {token: index for index, token in enumerate(["<unk>", *"\u2581whales"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Replace("\u2581", " ")
    found = starts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "whale whales")
    assert [token for token, begins in found if begins] == ["\u2581", "\u2581"]


def test_added_tokens_and_rows_without_a_token_are_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["whale"])
    table = word_starts(tokenizer, 400)
    assert table.shape == (400,)
    assert table[len(tokenizer) - 1 :].all()
