from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from character_tokenizer import character_tokenizer
from taught import chats, distillation, save_teacher
from tiny_networks import tiny_llama, tiny_tokenizer
from tiny_run import tiny_trainer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightllm.batch import IGNORE_INDEX, Document, pack_documents
from lightllm.losses import Divergence
from lightllm.models import Pretrained
from lightllm.modules import Distillation, HiddenStateLoss, OnPolicy
from lightllm.modules.other_tokenizer import OtherTokenizer

QUESTION, ANSWER = "Call me Ishmael, whale.", " The brow of the world"


def document(
    parts: list[tuple[str, bool]], number: int, end: bool = False, tokenizer: PreTrainedTokenizerFast | None = None
) -> Document:
    """Pieces of text with whether they are targets, tokenised one by one."""
    tokenizer = tokenizer or tiny_tokenizer()
    ids: list[int] = []
    targets: list[bool] = []
    for text, target in parts:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        targets += [target] * len(piece)
    if end:
        ids.append(tokenizer.eos_token_id)
        targets.append(True)
    return Document(ids, targets, number)


@pytest.mark.parametrize("shorter", [True, False])
def test_the_same_text_in_other_tokens(shorter: bool) -> None:
    ours, theirs = character_tokenizer(), tiny_tokenizer()
    if not shorter:
        ours, theirs = theirs, ours
    batch = pack_documents([[document([(QUESTION, False), (ANSWER, True)], 4, end=True, tokenizer=ours)]])
    made = OtherTokenizer(ours, theirs)(batch)
    start = [] if theirs.bos_token_id is None else [theirs.bos_token_id]
    whole = [*start, *theirs(QUESTION, add_special_tokens=False).input_ids]
    answer = [*theirs(ANSWER, add_special_tokens=False).input_ids, theirs.eos_token_id]
    own = batch["labels"][batch["labels"] != IGNORE_INDEX]
    assert made.batch["input_ids"][0].tolist() == [*whole, *answer][:-1]
    assert (len(answer) < len(own)) == shorter
    count = min(len(answer), len(own))
    assert made.batch["labels"][made.batch["labels"] != IGNORE_INDEX].tolist() == answer[:count]
    assert made.labels[made.labels != IGNORE_INDEX].tolist() == own[:count].tolist()
    assert made.batch["labels"][0, len(whole) - 1] == answer[0]


def test_as_many_targets_of_each_document_and_the_same_order() -> None:
    first = document([(QUESTION, False), (ANSWER, True), (QUESTION, False), (" brow", True)], 3)
    rows = [
        [first, document([("me ", False), ("x ** 2 # squared", True)], 1, end=True)],
        [document([(ANSWER, True)], 2)],
    ]
    batch = pack_documents(rows, length=120)
    made = OtherTokenizer(tiny_tokenizer(), character_tokenizer())(batch)
    ours = batch["document_ids"][made.labels != IGNORE_INDEX]
    theirs = made.batch["document_ids"][made.batch["labels"] != IGNORE_INDEX]
    assert torch.equal(ours, theirs)
    assert set(ours.tolist()) == {1, 2, 3}
    for number in (1, 2, 3):
        mine = batch["labels"][(batch["document_ids"] == number) & (batch["labels"] != IGNORE_INDEX)]
        assert made.labels[(batch["document_ids"] == number) & (made.labels != IGNORE_INDEX)].tolist() == (
            mine[: int((ours == number).sum())].tolist()
        )


def test_special_tokens_go_over_by_name_or_as_the_end() -> None:
    ours, theirs = tiny_tokenizer(), character_tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn, pad, end = (ours.convert_tokens_to_ids(token) for token in ("<turn>", "<pad>", "<eos>"))
    me = ours("me", add_special_tokens=False).input_ids
    ids = [turn, *me, end, pad, *me, turn, *me]
    batch = pack_documents([[Document(ids, [True] * len(ids), 0)]])
    made = OtherTokenizer(ours, theirs)(batch)
    told = theirs("me", add_special_tokens=False).input_ids
    expected = [1, 3, *told, 2, *told, 3, *told]
    assert made.batch["input_ids"][0].tolist() == expected[:-1]


def test_documents_are_cut_to_the_positions_that_there_are() -> None:
    batch = pack_documents([[document([(QUESTION, False), (ANSWER, True)], 4)], [document([("naive ", True)], 7)]])
    made = OtherTokenizer(tiny_tokenizer(), character_tokenizer(), max_length=12)(batch)
    assert (made.batch["document_ids"] == 7).any()
    assert int((made.batch["document_ids"] == 4).sum()) <= 12
    none = OtherTokenizer(tiny_tokenizer(), character_tokenizer(), max_length=2)(
        pack_documents([[document([(QUESTION, False), (ANSWER, True)], 4)]])
    )
    assert not (none.labels != IGNORE_INDEX).any()
    assert not (none.batch["labels"] != IGNORE_INDEX).any()


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A teacher with other tokens."""
    tokenizer = character_tokenizer()
    torch.manual_seed(1)
    network = tiny_llama(len(tokenizer))
    network.config.max_position_embeddings = 256
    network.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def universal(tmp_path: Path, other: str, **fields: object) -> Distillation:
    student = save_teacher(tmp_path / "student")
    module = distillation(student, None, divergence=Divergence("universal"), **fields)
    module.teacher_network = Pretrained(other)
    return module


def test_loss_is_the_papers(tmp_path: Path, other: str) -> None:
    module = universal(tmp_path, other, hard_loss=0.5)
    trainer = tiny_trainer(tmp_path, [], max_epochs=1)
    trainer.fit(module, datamodule=chats(tmp_path))
    data = trainer.datamodule  # type: ignore[attr-defined]
    (batch,) = data.excerpt("val")
    loss = module.criterion(module(batch), batch)
    student, teacher = module.built_network, module.built_teacher
    assert isinstance(student, LlamaForCausalLM)
    total = torch.zeros(())
    made = OtherTokenizer(data.loaded_tokenizer, character_tokenizer())(batch)
    for number in set(batch["document_ids"].flatten().tolist()) - {-1}:
        sequences = []
        for network, given, labels in ((student, batch, made.labels), (teacher, made.batch, made.batch["labels"])):
            here = given["document_ids"] == number
            logits = network(given["input_ids"][here][None]).logits[0]  # type: ignore[operator]
            sequences.append(logits[labels[here] != IGNORE_INDEX].softmax(-1))
        p, q = (F.pad(one, (0, 400 - one.shape[-1])).sort(-1, descending=True).values for one in sequences)
        assert len(p) == len(q) > 0
        total = total + (p - q).abs().sum()
    targets = batch["labels"] != IGNORE_INDEX
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    logits = student(**given).logits[targets]
    total = total + 0.5 * F.cross_entropy(logits, batch["labels"][targets], reduction="sum")
    torch.testing.assert_close(loss.sum, total, rtol=1e-4, atol=0.0)
    assert int(loss.weight) == int(targets.sum())


def test_it_learns_on_policy_too(tmp_path: Path, other: str) -> None:
    (before,) = tiny_trainer(tmp_path, []).validate(
        universal(tmp_path, other), datamodule=chats(tmp_path), verbose=False
    )
    trainer = tiny_trainer(tmp_path, [], max_epochs=3)
    trainer.fit(universal(tmp_path, other, on_policy=OnPolicy(0.3, max_new_tokens=8)), datamodule=chats(tmp_path))
    assert float(trainer.callback_metrics["val/divergence"]) < 0.9 * before["val/divergence"]


def test_the_same_tokenizer_is_not_translated(tmp_path: Path) -> None:
    module = universal(tmp_path, save_teacher(tmp_path / "same"))
    tiny_trainer(tmp_path, [], max_epochs=1).fit(module, datamodule=chats(tmp_path))
    assert module._translator is None


def test_what_is_refused(tmp_path: Path, other: str) -> None:
    module = universal(tmp_path, other, hidden_states=HiddenStateLoss(layers={1: 1}))
    with pytest.raises(ValueError, match="the teacher reads other tokens than the student, so that their inner states"):
        tiny_trainer(tmp_path, []).fit(module, datamodule=chats(tmp_path))
    module = universal(tmp_path, other)
    module.divergence = Divergence()
    with pytest.raises(ValueError, match=r"token 0 is .* set divergence.kind to universal"):
        tiny_trainer(tmp_path, []).fit(module, datamodule=chats(tmp_path))
