from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_texts import labelled_rows, save_labelled
from lightning.pytorch import Trainer
from ranks import run_on_ranks
from resumed import check_resumes
from tiny_architectures import small_fields
from tiny_checkpoint import saved
from tiny_encoders import encoder, tiny_encoder, wordpiece_tokenizer
from tiny_objective import Batches, MeasuredBatches, adamw
from tiny_run import tiny_trainer
from torch import Tensor
from torch.nn import functional as F

from lightllm.batch import Document, TextBatch, pack_documents, pad_documents
from lightllm.datamodules import Batches as RowBatches
from lightllm.datamodules import PairData, Reading
from lightllm.models import FromConfig, LoRA, Network, Pretrained
from lightllm.models.pooling import remembered_pooling
from lightllm.modules import ContrastivePretraining, InfoNCE, Schedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

SIZE = 97


def objective(network: Network | None = None, **fields: Any) -> ContrastivePretraining:
    torch.manual_seed(0)
    module = ContrastivePretraining(network or encoder(), **({"optimizer": adamw(1e-2, 0.0)} | fields))
    module.configure_model()
    return module


def texts(groups: int, size: int, seed: int = 0, first: int = 0) -> list[Document]:
    """Groups whose first two texts end alike."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for group in range(groups):
        end = int(torch.randint(5, SIZE, (), generator=generator))
        for column in range(size):
            length = int(torch.randint(3, 8, (), generator=generator))
            ids = torch.randint(5, SIZE, (length,), generator=generator).tolist()
            ids = [*ids, end, end, end] if column < 2 else ids
            label = size if column == 0 else 0
            made.append(Document([*ids, label], [*[False] * len(ids), True], first + group * size + column))
    return made


def alone(module: ContrastivePretraining, made: Sequence[Document]) -> Tensor:
    """Mean embeddings of texts one at a time."""
    rows = []
    for document in made:
        ids = torch.as_tensor(document.input_ids)[None, :-1]
        rows.append(module.built_network(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(rows)


def multiple_negatives(vectors: Tensor, size: int, scale: float = 20.0) -> Tensor:
    """MultipleNegativesRankingLoss as sentence-transformers defines it, summed over anchors."""
    anchors = vectors[::size]
    candidates = torch.cat([vectors[column::size] for column in range(1, size)])
    scores = F.normalize(anchors) @ F.normalize(candidates).T * scale
    return F.cross_entropy(scores, torch.arange(len(anchors)), reduction="sum")


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_loss_is_multiple_negatives_ranking(size: int, packed: bool, kind: str) -> None:
    module = objective(encoder() if kind == "bert" else FromConfig("llama", small_fields("llama")))
    made = texts(5, size)
    batch = pack_documents([made[: 2 * size], made[2 * size :]]) if packed else pad_documents(made)
    ours = module.criterion(module(batch), batch)
    expected = multiple_negatives(alone(module, made), size)
    torch.testing.assert_close(ours.sum, expected, rtol=1e-4, atol=1e-4)
    assert int(ours.weight) == 5


def gradients(module: ContrastivePretraining, batch: TextBatch, seed: int = 5) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(seed)
    module.criterion(module(batch), batch).sum.backward()
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("rows_at_once", [1, 3, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_gradients_are_the_same_whatever_the_chunk(rows_at_once: int, packed: bool) -> None:
    module = objective(loss=InfoNCE(widths=[8, 32], symmetric=True))
    made = texts(6, 3)
    batch = pack_documents([made[:3], made[3:12], made[12:]]) if packed else pad_documents(made)
    whole = gradients(module, batch)
    module.rows_at_once = rows_at_once
    parts = gradients(module, batch)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-5)


def test_cached_gradients_are_of_the_units_that_were_dropped() -> None:
    module = objective(encoder(hidden_dropout_prob=0.3), rows_at_once=2, positives="dropout").train()
    module.built_network.train()
    batch = pad_documents(texts(4, 1))
    ours = gradients(module, batch)
    module.zero_grad()
    torch.manual_seed(5)
    parts = [
        TextBatch(**{name: batch[name][row : row + 2] for name in batch})  # type: ignore[literal-required, typeddict-item]
        for row in (0, 2)
    ]
    trimmed = [
        TextBatch(**{name: part[name][:, : int((part["document_ids"] >= 0).sum(1).max())] for name in part})  # type: ignore[literal-required, typeddict-item]
        for part in parts
    ]
    first, second = (torch.cat([module._embed(part).vectors for part in trimmed]) for _ in range(2))
    scores = F.normalize(first) @ F.normalize(second).T * 20
    F.cross_entropy(scores, torch.arange(4), reduction="sum").backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_activations_of_few_rows_are_kept() -> None:
    module = objective()
    batch = pad_documents(texts(8, 2))

    def kept(rows_at_once: int | None) -> int:
        module.rows_at_once = rows_at_once
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module.criterion(module(batch), batch)
        return sum(sizes)

    assert kept(2) < kept(None) / 10


def test_dropout_makes_positives(tmp_path: Path) -> None:
    batch = pad_documents(texts(6, 1))
    module = objective(encoder(hidden_dropout_prob=0.2), positives="dropout")
    data = MeasuredBatches([batch] * 3, [batch])
    trainer = tiny_trainer(tmp_path, [])
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["val/loss"]) > 0
    assert "val/recall_at_1" not in trainer.callback_metrics
    still = objective(encoder(), positives="dropout")
    with pytest.raises(ValueError, match="this one does not"):
        still.criterion(still(batch), batch)
    pairless = objective()
    with pytest.raises(ValueError, match="set positives to dropout"):
        pairless.criterion(pairless(batch), batch)


def test_equal_texts_are_no_negatives() -> None:
    module = objective()
    made = texts(3, 2)
    doubled = [*made, *(one._replace(document_id=6 + index) for index, one in enumerate(made[2:4]))]
    batch = pad_documents(doubled)
    losses = module.criterion(module(batch), batch)
    vectors = alone(module, made)
    scores = F.normalize(vectors[[0, 2, 4, 2]]) @ F.normalize(vectors[[1, 3, 5, 3]]).T * 20
    scores[1, 3] = scores[3, 1] = -torch.inf
    expected = F.cross_entropy(scores, torch.arange(4), reduction="sum")
    torch.testing.assert_close(losses.sum, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_texts_learn_to_find_each_other(tmp_path: Path, adapter: Any) -> None:
    source: Network = encoder() if adapter is None else Pretrained(saved(tmp_path / "n", tiny_encoder(task="encoder")))
    module = objective(source, adapter=adapter)
    batches = [pad_documents(texts(16, 2, seed)) for seed in range(60)]
    data = MeasuredBatches(batches, [pad_documents(texts(16, 2, seed)) for seed in (98, 99)])
    trainer = tiny_trainer(tmp_path, [])
    trainer.validate(module, datamodule=data, verbose=False)
    before = float(trainer.callback_metrics["val/recall_at_1"])
    trainer.fit(module, datamodule=data)
    after = float(trainer.callback_metrics["val/recall_at_1"])
    assert after > before + 0.2
    assert {"val/loss", "val/recall_at_10", "val/reciprocal_rank"} <= set(trainer.callback_metrics)
    assert remembered_pooling(module.built_network) == ("mean", 16)


@pytest.mark.parametrize("positives", ["given", "dropout"])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, positives: Any) -> None:
    tokenizer = wordpiece_tokenizer()

    def data() -> PairData:
        return PairData(
            save_labelled(tmp_path / "rows.jsonl", labelled_rows()),
            tokenizer=tokenizer,
            fields=["text"],
            label_field="label" if positives == "given" else None,
            max_length=16,
            batches=RowBatches(mode="sorted", documents=7),
            reading=Reading(cache=str(tmp_path / "cache"), processes=1),
        )

    def module() -> ContrastivePretraining:
        network = encoder(vocab_size=len(tokenizer), hidden_dropout_prob=0.2)
        fields: dict[str, Any] = {"optimizer": adamw(), "schedule": Schedule("constant")}
        return ContrastivePretraining(network, positives=positives, rows_at_once=3, **fields)

    check_resumes(tmp_path / "runs", module, data)


def train_on_rank(batches: list[list[TextBatch]], folder: Path) -> dict[str, Tensor]:
    rank = torch.distributed.get_rank()
    module = objective(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        max_steps=2,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Batches(batches[rank]))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_negatives_of_all_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    steps = [texts(6, 2, seed) for seed in range(2)]
    shares = [[pad_documents(made[:4]) for made in steps], [pad_documents(made[4:]) for made in steps]]
    one, other = run_on_ranks(train_on_rank, 2, shares, tmp_path)
    alone = objective(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = tiny_trainer(tmp_path, [], max_steps=2)
    trainer.fit(alone, datamodule=Batches([pad_documents(made) for made in steps]))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(one[name], other[name])


def test_what_can_not_be_embedded_is_refused() -> None:
    with pytest.raises(ValueError, match="rows_at_once is 0"):
        ContrastivePretraining(encoder(), rows_at_once=0)
    with pytest.raises(ValueError, match=r"loss\.temperature is 0"):
        InfoNCE(temperature=0)
    with pytest.raises(ValueError, match="an embedding has at least one number"):
        InfoNCE(widths=[8, 0])
    with pytest.raises(ValueError, match="embeddings of this network have 32 numbers"):
        objective(loss=InfoNCE(widths=[8, 64]))
    module = objective()
    with pytest.raises(ValueError, match="run lightllm export"):
        module.predict_step(pad_documents(texts(2, 2)), 0)
