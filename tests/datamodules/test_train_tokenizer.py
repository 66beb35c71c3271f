from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightllm.datamodules.pydoc_rows import topic_rows
from lightllm.datamodules.train_tokenizer import BEGIN, END, MASK, PADDING, TrainTokenizer, strings_in

TEXTS = [row["text"] for row in topic_rows()[:20]]


def test_trained_tokenizer_encodes_anything_and_back() -> None:
    tokenizer = TrainTokenizer(600).train(TEXTS)
    assert len(tokenizer) == 600
    for text in (TEXTS[3], "üñí  \n\t漢字 😀", " leading and trailing ", f"written out: {END}"[:-6]):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, PADDING)
    trained, bytes_alone = (len(tokenizer(TEXTS[3])["input_ids"]), len(TEXTS[3].encode()))
    assert trained < 0.7 * bytes_alone


def test_equal_texts_make_equal_tokenizers(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        TrainTokenizer(500).train_into(tmp_path / name, iter(TEXTS))
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded(TEXTS[0])["input_ids"] == TrainTokenizer(500).train(TEXTS)(TEXTS[0])["input_ids"]


def test_a_tokenizer_for_encoders_masks_and_ends_and_pairs_texts(tmp_path: Path) -> None:
    TrainTokenizer(600, encoder=True).train_into(tmp_path, iter(TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token) == (MASK, BEGIN, END)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a word", "and more"))
    assert tokenizer("a word")["input_ids"] == [begin, *one, end]
    assert tokenizer("a word", "and more")["input_ids"] == [begin, *one, end, *other, end]
    assert len(tokenizer) == 600


def test_training_reads_no_more_text_than_asked() -> None:
    read = []

    def texts() -> object:
        for index in range(100):
            read.append(index)
            yield "some words to learn " * 20_000

    TrainTokenizer(270, megabytes=1).train(texts())  # type: ignore[arg-type]
    assert len(read) == 4


def test_vocabulary_too_small_and_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 258, but bytes and special tokens alone take 259"):
        TrainTokenizer(258).train(["text"])
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        TrainTokenizer(300).train([])


def test_strings_in_rows() -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "score": 3, "tags": ["a", None], "b": b"no"}
    assert list(strings_in(row)) == ["user", "Hi", "a"]
