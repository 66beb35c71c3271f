import pytest
import torch
from tiny_networks import TEXT, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightllm.models.load import load_tokenizer
from lightllm.models.token_bytes import bytes_per_token


def counted(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return int(bytes_per_token(tokenizer)[tokenizer(text, add_special_tokens=False).input_ids].sum())


@pytest.mark.parametrize("text", [TEXT, "東京 🐋🐳 naïve", "  two  spaces\t\n", "x" * 50, "\x00\x7f"])
def test_byte_level_tokens_count_the_bytes_of_their_text(text: str) -> None:
    assert counted(tiny_tokenizer(), text) == len(text.encode())


def test_special_tokens_and_rows_without_a_token_count_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("naïve fool", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    text = "a naïve fool<|user|>!<eos>"
    assert counted(tokenizer, text) == len("a naïve fool!".encode())
    table = bytes_per_token(tokenizer, vocab_size=400)
    assert table.shape == (400,)
    assert table.dtype == torch.int64
    assert table[len(tokenizer) :].sum() == 0
    assert torch.equal(table[: len(tokenizer)], bytes_per_token(tokenizer))
    with pytest.raises(ValueError, match="more than the network's 10"):
        bytes_per_token(tokenizer, vocab_size=10)
    assert bytes_per_token(None, vocab_size=10).tolist() == [0] * 10


def test_sentencepiece_counts_its_first_space_and_single_bytes() -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", *byte_tokens, *"\u2581thewalnv#", "th", "##"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("#", "#")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "## the whale naïve\n"
    assert {"##", "<0x0A>", "<0xC3>"} <= set(tokenizer.tokenize(text))
    assert counted(tokenizer, text) == len(f" {text}".encode())
    assert bytes_per_token(tokenizer)[1:257].tolist() == [1] * 256


def test_wordpiece_counts_letters_without_its_marks() -> None:
    vocabulary = {"[UNK]": 0, "whale": 1, "##s": 2, "na": 3, "##ïve": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert bytes_per_token(tokenizer).tolist() == [0, 5, 1, 2, 4]


def test_an_end_of_word_is_a_space() -> None:
    backend = Tokenizer(models.BPE({"w": 0, "h</w>": 1}, [], end_of_word_suffix="</w>"))
    assert bytes_per_token(PreTrainedTokenizerFast(tokenizer_object=backend)).tolist() == [1, 2]


@pytest.mark.real_model
def test_a_real_vocabulary_counts_the_bytes_of_its_text() -> None:
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    for text in (TEXT, "def f(x):\n    return x\n", "🐋 Größe 12,345"):
        assert counted(tokenizer, text) == len(text.encode())
