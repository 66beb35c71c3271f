from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from ranks import run_on_ranks
from resumed import check_resumes
from tiny_checkpoint import saved
from tiny_encoders import WORDS, encoder, tiny_encoder, token_documents, wordpiece_tokenizer
from tiny_objective import Batches, MeasuredBatches, adamw
from tiny_run import tiny_trainer
from torch.nn import functional as F

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, pack_documents, pad_documents
from lightllm.datamodules import Batches as RowBatches
from lightllm.datamodules import DocumentData, Reading, SentencePairData, TextData
from lightllm.export import export
from lightllm.masking import PLANES, Masking, fixed_uniforms
from lightllm.models import LoRA, Network, Pretrained
from lightllm.modules import MaskedPretraining, Schedule
from lightllm.modules.masked import MaskedMetrics
from lightllm.modules.sentence_head import token_types

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

SIZE = len(wordpiece_tokenizer())


def objective(network: Network | None = None, **fields: Any) -> MaskedPretraining:
    torch.manual_seed(0)
    module = MaskedPretraining(network or encoder(vocab_size=SIZE), **({"optimizer": adamw(1e-2, 0.0)} | fields))
    module.tokenizer = wordpiece_tokenizer()
    module.configure_model()
    return module


def documents(count: int = 6) -> list[Document]:
    return token_documents(count, vocabulary=SIZE)


def sentence_pairs(count: int = 8) -> list[Document]:
    """Words and pieces; the second text repeats the first one's word, or does not, which is the label."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index in range(count):
        label = index % 2
        first = int(torch.randint(5, 5 + len(WORDS), (), generator=generator))
        second = first if label == 0 else 5 + (first - 4) % len(WORDS)
        ids = [2, first, first, 3, second, second, 3]
        made.append(Document([*ids, label], [*[False] * len(ids), True], index))
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_transformers_own(packed: bool) -> None:
    module = objective()
    made = documents()
    batch = module.masked(pad_documents(made), fixed_uniforms(pad_documents(made)))
    plain = copy.deepcopy(module.built_network)
    inside = (batch["document_ids"] >= 0).long()
    logits = plain(input_ids=batch["input_ids"], attention_mask=inside).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    if packed:
        rows = pack_documents([made[:4], made[4:]])
        batch = module.masked(rows, fixed_uniforms(rows))
    ours = module.criterion(module(batch), batch)
    torch.testing.assert_close(ours.sum, expected, rtol=1e-5, atol=1e-5)
    assert int(ours.weight) == int((batch["labels"] != IGNORE_INDEX).sum()) > 3
    ours.sum.backward()
    expected.backward()
    for name, parameter in plain.named_parameters():
        gradient = module.built_network.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_masks_are_new_in_training_and_always_the_same_in_validation(tmp_path: Path) -> None:
    module = objective(schedule=None)
    seen: dict[bool, list[Any]] = {True: [], False: []}
    forward = module.forward

    def noting(batch: TextBatch) -> Any:
        seen[module.training].append(batch["input_ids"].tolist())
        return forward(batch)

    module.forward = noting  # type: ignore[method-assign]
    batch = pad_documents(documents())
    data = MeasuredBatches([batch] * 3, [batch], tokenizer=wordpiece_tokenizer())
    trainer = tiny_trainer(tmp_path, [], max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert len(seen[True]) == 6
    assert len({str(one) for one in seen[True]}) == 6
    assert len(seen[False]) == 2
    assert seen[False][0] == seen[False][1] != batch["input_ids"].tolist()
    names = {"val/loss", "val/perplexity", "val/masked_accuracy", "val/most_frequent_accuracy", "train/loss"}
    assert names <= set(trainer.callback_metrics)


def test_metrics_are_those_of_the_whole_logits() -> None:
    module = objective()
    batches = [pad_documents(documents()[:4]), pack_documents([documents()[4:]])]
    losses, right, tokens = [], [], []
    for batch in batches:
        module.measure(batch)
        masked = module.masked(batch, fixed_uniforms(batch))
        for document in batch["document_ids"].unique().tolist():
            if document < 0:
                continue
            inside = batch["document_ids"] == document
            labels = masked["labels"][inside]
            logits = module.built_network(input_ids=masked["input_ids"][inside][None]).logits[0]
            chosen = labels != IGNORE_INDEX
            losses += F.cross_entropy(logits[chosen], labels[chosen], reduction="none").tolist()
            right += (logits[chosen].argmax(1) == labels[chosen]).tolist()
            tokens += labels[chosen].tolist()
    values = module.metrics.compute()
    assert float(values["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(values["perplexity"]) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert float(values["masked_accuracy"]) == pytest.approx(sum(right) / len(right))
    most = max(tokens.count(token) for token in tokens) / len(tokens)
    assert float(values["most_frequent_accuracy"]) == pytest.approx(most)


def test_second_head_is_trained_beside_the_first() -> None:
    module = objective(sentence_loss=0.5)
    batch = pad_documents(sentence_pairs())
    masked = module.masked(batch, fixed_uniforms(batch))
    network, head = module.built_network, module.sentence_head
    assert head is not None
    types = token_types(masked, 3)
    hidden = network.bert(input_ids=masked["input_ids"], token_type_ids=types).last_hidden_state
    logits = network.cls(hidden)
    per_token = F.cross_entropy(logits.flatten(0, 1), masked["labels"].flatten(), reduction="sum")
    labels = torch.tensor([0, 1] * 4)
    pooled = head(hidden[:, 0])
    counts = (masked["labels"] != IGNORE_INDEX).sum(1)
    expected = per_token + 0.5 * (F.cross_entropy(pooled, labels, reduction="none") * counts).sum()
    ours = module.criterion(module(masked), masked)
    torch.testing.assert_close(ours.sum, expected, rtol=1e-5, atol=1e-5)
    assert int(ours.weight) == int(counts.sum())
    with torch.no_grad():
        module.measure(batch)
    values = module.metrics.compute()
    assert float(values["sentence_accuracy"]) == pytest.approx(float((pooled.argmax(1) == labels).float().mean()))
    assert float(values["sentence_loss"]) == pytest.approx(float(F.cross_entropy(pooled, labels).detach()), rel=1e-5)


def test_loss_is_the_same_however_pairs_are_cut_into_batches() -> None:
    module = objective(sentence_loss=1.0)
    made = sentence_pairs()
    found = []
    for batches in ([pad_documents(made)], [pack_documents([made[:3]]), pack_documents([made[3:5], made[5:]], 30)]):
        losses = []
        for batch in batches:
            masked = module.masked(batch, fixed_uniforms(batch))
            losses.append(module.criterion(module(masked), masked))
        found.append((sum(float(loss.sum.detach()) for loss in losses), sum(int(loss.weight) for loss in losses)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_it_learns_both_tasks(tmp_path: Path) -> None:
    module = objective(sentence_loss=1.0)
    batch = pad_documents(sentence_pairs(40))
    data = MeasuredBatches([batch] * 120, [batch], tokenizer=wordpiece_tokenizer())
    trainer = tiny_trainer(tmp_path, [], max_epochs=1)
    trainer.fit(module, datamodule=data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/sentence_accuracy"] > 0.8  # some of the words that tell it are masked
    assert found["val/masked_accuracy"] > 2 * found["val/most_frequent_accuracy"]


def test_an_encoder_without_a_head_begins_with_the_same_one_every_time(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_encoder(task="encoder", vocab_size=SIZE))
    torch.manual_seed(1)
    one = objective(Pretrained(source))
    torch.manual_seed(2)
    other = objective(Pretrained(source))
    for name, parameter in one.built_network.named_parameters():
        assert torch.equal(parameter, other.built_network.get_parameter(name)), name
    encoder_weight = tiny_encoder(task="encoder", vocab_size=SIZE).embeddings.word_embeddings.weight
    assert torch.equal(one.built_network.get_parameter("bert.embeddings.word_embeddings.weight"), encoder_weight)


def test_lora_on_an_encoder_and_its_export(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_encoder(vocab_size=SIZE))
    module = objective(Pretrained(source), adapter=LoRA(rank=2))
    batch = pad_documents(documents())
    data = Batches([batch] * 4, tokenizer=wordpiece_tokenizer())
    tiny_trainer(tmp_path, []).fit(module, datamodule=data)
    report = export(module.built_network, wordpiece_tokenizer(), tmp_path / "export")
    assert report.relative_logit_difference is not None
    assert report.relative_logit_difference < 1e-4
    from transformers import AutoModelForMaskedLM

    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    before = tiny_encoder(vocab_size=SIZE)
    assert not torch.equal(
        loaded.bert.encoder.layer[0].attention.self.query.weight,
        before.bert.encoder.layer[0].attention.self.query.weight,
    )


def test_what_is_predicted_is_what_validation_masks() -> None:
    module = objective()
    batch = pad_documents(documents())
    with torch.no_grad():
        found = module.predict_step(batch, 0)
    masked = module.masked(batch, fixed_uniforms(batch))
    assert torch.equal(batch["labels"], masked["labels"])
    assert torch.equal(found != 0, masked["labels"] != IGNORE_INDEX)
    module.measure(batch)
    assert -float(found.sum() / (found != 0).sum()) == pytest.approx(float(module.metrics.compute()["loss"]), rel=1e-5)


def test_special_tokens_are_not_masked() -> None:
    module = objective(masking=Masking(share=0.9))
    batch = pad_documents(sentence_pairs(30))
    masked = module.masked(batch, torch.rand(PLANES, *batch["input_ids"].shape))
    special = batch["input_ids"] < 5
    assert torch.equal(masked["input_ids"][special], batch["input_ids"][special])
    assert (masked["labels"][special] == IGNORE_INDEX).all()


def test_metrics_without_pairs_say_nothing_of_them() -> None:
    metrics = MaskedMetrics()
    metrics.update(torch.tensor(4.0), torch.tensor(1), torch.tensor([7, 7, 8]))
    metrics.update(torch.tensor(2.0), torch.tensor(1), torch.tensor([7]))
    values = metrics.compute()
    assert {name: round(float(value), 4) for name, value in values.items()} == {
        "loss": 1.5,
        "perplexity": round(math.exp(1.5), 4),
        "masked_accuracy": 0.5,
        "most_frequent_accuracy": 0.75,
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, pairs: bool) -> None:
    rows = [json.dumps({"text": " ".join(f"w{(d + s) % 10} ab." for s in range(12))}) + "\n" for d in range(9)]
    (tmp_path / "texts.jsonl").write_text("".join(rows))

    def data() -> DocumentData:
        kind: Any = SentencePairData if pairs else TextData
        return kind(
            str(tmp_path / "texts.jsonl"),
            tokenizer=wordpiece_tokenizer(),
            max_length=32,
            batches=RowBatches(mode="sorted" if pairs else "packed", tokens=64),
            reading=Reading(cache=str(tmp_path / "cache"), processes=1),
            **({"words": 2} if pairs else {"reads_end": True}),
        )

    def module() -> MaskedPretraining:
        network = encoder(vocab_size=SIZE, hidden_dropout_prob=0.1)
        return MaskedPretraining(network, sentence_loss=float(pairs), optimizer=adamw(), schedule=Schedule("constant"))

    check_resumes(tmp_path / "runs", module, data)


def measure_on_rank(batches: list[list[TextBatch]], folder: Path) -> dict[str, float]:
    module = objective(sentence_loss=1.0)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    mine = batches[torch.distributed.get_rank()]
    data = MeasuredBatches(mine * 2, mine, tokenizer=wordpiece_tokenizer())
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    found = dict(values) | {"trained": float(sum(one.double().sum() for one in module.state_dict().values()))}
    return {name: float(value) for name, value in found.items()}


def test_two_ranks_measure_as_one_process_does(tmp_path: Path) -> None:
    made = sentence_pairs(12)
    shares = [[pad_documents(made[:3])], [pad_documents(made[3:])]]
    one, other = run_on_ranks(measure_on_rank, 2, shares, tmp_path)
    assert one == other
    module = objective(sentence_loss=1.0)
    with torch.no_grad():
        module.measure(pad_documents(made))
    for name, value in module.metrics.compute().items():
        assert one[f"val/{name}"] == pytest.approx(float(value), rel=1e-5)


def test_what_can_not_be_masked_is_refused() -> None:
    with pytest.raises(ValueError, match="sentence_loss is -1"):
        MaskedPretraining(encoder(), sentence_loss=-1)
    module = MaskedPretraining(encoder(vocab_size=SIZE))
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        module.configure_model()
    from tiny_objective import scratch

    with pytest.raises(ValueError, match="'llama' has no head that predicts masked tokens"):
        MaskedPretraining(scratch()).configure_model()
    sentences = objective(sentence_loss=1.0)
    batch = pad_documents(documents())
    with pytest.raises(ValueError, match="use SentencePairData"):
        sentences.masked(batch, fixed_uniforms(batch))
