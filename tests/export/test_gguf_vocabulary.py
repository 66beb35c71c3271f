import pytest
from tiny_networks import TEXT, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightllm.export.gguf_vocabulary import CONTROL, NORMAL, SPLITS, UNUSED, USER_DEFINED, vocabulary

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def cut_by(*parts: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(list(parts))
    return tokenizer


def test_tokens_merges_and_kinds_are_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("[call]", normalized=False)])
    found = vocabulary(tokenizer, len(tokenizer) + 2)
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found.tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert found.kinds[:3] == [CONTROL] * 3
    assert found.kinds[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert set(found.kinds[3:-3]) == {NORMAL}
    # Written down and read again, merges cut text into the same tokens.
    pairs = [tuple(merge.split(" ")) for merge in found.merges]
    tokens = {token: index for index, token in enumerate(found.tokens[: len(tokenizer) - 1])}
    again = Tokenizer(models.BPE(tokens, pairs))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert again.encode(TEXT).ids == tokenizer(TEXT).input_ids


def test_the_ways_to_cut_text_have_their_names() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert vocabulary(cut_by(byte_level), 320).split == "gpt-2"
    assert vocabulary(cut_by(pre_tokenizers.Digits(individual_digits=True), byte_level), 320).split == "smollm"
    for name in ("llama-bpe", "qwen2"):
        assert vocabulary(cut_by(pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), BYTES), 320).split == name
    tokenizer = cut_by(byte_level)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert vocabulary(tokenizer, 320).split == "gpt-2"


@pytest.mark.parametrize(
    "parts",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [BYTES],
        [pre_tokenizers.Whitespace()],
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), BYTES],
        [pre_tokenizers.Split(Regex(SPLITS["qwen2"]), "removed"), BYTES],
    ],
)
def test_other_ways_to_cut_text_are_refused(parts: list[pre_tokenizers.PreTokenizer]) -> None:
    with pytest.raises(ValueError, match="only byte-level BPE of the kinds gpt-2, smollm, llama-bpe, qwen2 can"):
        vocabulary(cut_by(*parts), 320)


def test_other_tokenizers_are_refused() -> None:
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="a BPE tokenizer that cuts"):
        vocabulary(lower, 320)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="a WordLevel tokenizer"):
        vocabulary(words, 320)
    with pytest.raises(ValueError, match="more than the network's 10"):
        vocabulary(tiny_tokenizer(), 10)
