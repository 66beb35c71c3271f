import pytest
from tiny_networks import TEXT, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightllm.generate.prompt import chat_prompt, encode_prompt, incremental_text

CHAT = [{"role": "user", "content": "Who?"}]


def test_text_becomes_its_tokens_without_an_end_token() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer("Call me").input_ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<turn> $A <eos>", special_tokens=[("<turn>", 2), ("<eos>", 0)]
    )
    assert tokenizer("Call me").input_ids == [2, *plain, 0]
    assert encode_prompt(tokenizer, "Call me") == plain
    tokenizer.bos_token = "<turn>"
    assert encode_prompt(tokenizer, "Call me") == [2, *plain]
    assert encode_prompt(tokenizer, "<turn>Call me") == [2, *plain]


def test_a_chat_is_rendered_as_its_template_says() -> None:
    tokenizer = tiny_tokenizer()
    assert chat_prompt(tokenizer, CHAT) == "User:\nWho?\nAssistant:\n"
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}!"
    tokenizer.bos_token = "<turn>"
    assert chat_prompt(tokenizer, CHAT) == "<turn>Who?!"
    assert encode_prompt(tokenizer, CHAT) == tokenizer("<turn>Who?!").input_ids


def test_token_ids_are_taken_as_they_are_and_nothing_begins_like_a_document() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, (5, 6)) == [5, 6]
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(tokenizer, "")


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_pieces_join_to_the_text_and_never_show_half_a_character(cut: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT * 2).input_ids
    pieces = list(incremental_text(tokenizer, ids[:cut], [*ids[cut:], tokenizer.eos_token_id]))
    assert tokenizer.decode(ids[:cut]) + "".join(pieces) == TEXT * 2
    assert len(pieces) > 50
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_last_character_that_never_completes_is_shown_as_broken() -> None:
    tokenizer = tiny_tokenizer()
    broken = tokenizer("x\N{SPOUTING WHALE}").input_ids[:-1]
    assert "".join(incremental_text(tokenizer, [5], broken)) == tokenizer.decode(broken)


def test_spaces_survive_a_tokenizer_that_drops_the_first() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581whale": 2, "s": 3, "\u2581": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([2]) == "whale"
    assert list(incremental_text(tokenizer, [1], [2, 3, 1])) == [" whale", "s", " the"]
