from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_texts import labelled_documents, labelled_rows, save_labelled
from resumed import check_resumes
from tiny_encoders import encoder, tiny_encoder, wordpiece_tokenizer
from tiny_objective import MeasuredBatches, adamw
from tiny_run import tiny_trainer
from torch.nn import functional as F

from lightllm.batch import IGNORE_INDEX, Document, pack_documents, pad_documents
from lightllm.datamodules import Batches, ClassificationData, Reading
from lightllm.models import Adapter, LinearProbe, LoRA, Network, Pretrained
from lightllm.modules import Schedule, SequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

CLASSES = ["a", "b", "c"]


def objective(network: Network | None = None, adapter: Adapter | None = None, **fields: Any) -> SequenceClassification:
    torch.manual_seed(0)
    fields = {"optimizer": adamw(1e-2, 0.0)} | fields
    module = SequenceClassification(network or encoder(), adapter, **fields)
    module.classes = CLASSES
    module.configure_model()
    with torch.no_grad():
        module.built_classifier.weight.normal_()
    return module


def pretrained(folder: Path) -> Pretrained:
    network = tiny_encoder(task="encoder", hidden_dropout_prob=0.3)
    network.save_pretrained(folder)
    return Pretrained(str(folder))


class Labelled(MeasuredBatches):
    """Batches, and the classes that they are of."""

    classes = CLASSES


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_texts_alone(packed: bool, smoothing: float) -> None:
    module = objective(label_smoothing=smoothing)
    made = labelled_documents(6)
    batch = pack_documents([made[:4], made[4:]]) if packed else pad_documents(made)
    ours = module.criterion(module(batch), batch)
    expected, classifier = torch.zeros(()), module.built_classifier
    for document in made:
        ids = torch.as_tensor(document.input_ids)
        states = module.built_network(input_ids=ids[None, :-1]).last_hidden_state[0]
        logits = classifier(states.mean(0))
        expected = expected + F.cross_entropy(logits[None], ids[-1:], label_smoothing=smoothing)
    torch.testing.assert_close(ours.sum, expected, rtol=1e-4, atol=1e-4)
    assert int(ours.weight) == 6
    ours.sum.backward()
    assert classifier.weight.grad is not None
    assert module.built_network.embeddings.word_embeddings.weight.grad is not None


def test_texts_without_a_class_count_nothing() -> None:
    module = objective()
    made = labelled_documents(4)
    unlabelled = [Document(one.input_ids, [False] * len(one.input_ids), one.document_id) for one in made[2:]]
    some = module.criterion(module(pad_documents([*made[:2], *unlabelled])), pad_documents([*made[:2], *unlabelled]))
    alone = module.criterion(module(pad_documents(made[:2])), pad_documents(made[:2]))
    torch.testing.assert_close(some.sum, alone.sum, rtol=1e-4, atol=1e-4)
    assert int(some.weight) == 2


@pytest.mark.parametrize("adapter", [LinearProbe(), LoRA(rank=4), None], ids=["probe", "lora", "full"])
def test_classes_are_learned(tmp_path: Path, adapter: Any) -> None:
    module = objective(pretrained(tmp_path), adapter)
    before = {name: value.clone() for name, value in module.built_network.state_dict().items()}
    batches = [pad_documents(labelled_documents(24, seed=seed)) for seed in range(2)] * 40
    val = [pad_documents(labelled_documents(24, seed=5))]
    trainer = tiny_trainer(tmp_path, [])
    trainer.fit(module, datamodule=Labelled(batches, val))
    assert float(trainer.callback_metrics["val/accuracy"]) > (0.45 if isinstance(adapter, LinearProbe) else 0.6)
    assert {"val/loss", "val/macro_f1", "train/loss"} <= set(trainer.callback_metrics)
    changed = [
        name for name, value in module.built_network.state_dict().items() if not torch.equal(value, before[name])
    ]
    if isinstance(adapter, LinearProbe):
        assert not changed
    else:
        assert changed
        assert all("lora" in name for name in changed) == isinstance(adapter, LoRA)


def test_a_probe_embeds_each_text_once_and_without_dropout(tmp_path: Path) -> None:
    module = objective(pretrained(tmp_path), LinearProbe()).train()
    batch = pad_documents(labelled_documents(6))
    calls: list[int] = []
    module.built_network.register_forward_hook(lambda *_: calls.append(1))
    first, second = module(batch), module(pad_documents(labelled_documents(6)[::-1]))
    assert len(calls) == 1
    assert torch.equal(first, second)
    assert module.built_network.training
    module.eval()
    torch.testing.assert_close(module(batch), first)


def test_probabilities_stand_at_the_labels() -> None:
    module = objective()
    for batch in (pad_documents(labelled_documents(5)[::-1]), pack_documents([labelled_documents(5)])):
        with torch.no_grad():
            found = module.predict_step(batch, 0)
            scores = module(batch).log_softmax(1)
        assert torch.equal(found != 0, batch["labels"] != IGNORE_INDEX)
        for document in range(5):
            place = (batch["document_ids"] == document) & (batch["labels"] != IGNORE_INDEX)
            torch.testing.assert_close(found[place][0], scores[document, document % 3])


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = save_labelled(tmp_path / "rows.jsonl", labelled_rows())
    source = pretrained(tmp_path / "network")

    def data() -> ClassificationData:
        return ClassificationData(
            file,
            tokenizer=wordpiece_tokenizer(),
            shots=4,
            val_rows=0,
            test_rows=9,
            max_length=16,
            batches=Batches(mode="sorted", documents=5),
            reading=Reading(cache=str(tmp_path / "cache"), processes=1),
        )

    for name, adapter in (("probe", LinearProbe()), ("lora", LoRA(rank=2, dropout=0.1))):

        def module(adapter: Adapter = adapter) -> SequenceClassification:
            return SequenceClassification(source, adapter, optimizer=adamw(), schedule=Schedule("constant"))

        check_resumes(tmp_path / name, module, data)


def test_what_has_no_classes_is_refused() -> None:
    module = SequenceClassification(encoder())
    module.configure_model()
    with pytest.raises(ValueError, match="the data does not say which classes there are"):
        module(pad_documents(labelled_documents(3)))
    with pytest.raises(ValueError, match="use ClassificationData"):
        objective().criterion(torch.zeros(1, 3), pad_documents([Document([1, 2, 3], [True] * 3, 0)]))
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        SequenceClassification(encoder(), label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"the data has the classes \['a', 'b', 'c'\], the checkpoint \['a'\]"):
        objective().on_load_checkpoint({"classes": ["a"]})
