from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_texts import labelled_documents, labelled_rows, save_labelled
from resumed import check_resumes
from tiny_encoders import encoder, tiny_encoder, wordpiece_tokenizer
from tiny_objective import adamw
from tiny_run import tiny_trainer
from torch import Tensor
from torch.nn import functional as F

from lightllm.batch import IGNORE_INDEX, Document, pack_documents, pad_documents
from lightllm.checkpoint_io import newest_checkpoint
from lightllm.datamodules import Batches, ClassificationData, EpisodeData, Reading
from lightllm.models import Adapter, LinearProbe, Network, Pretrained
from lightllm.modules import PrototypicalNetwork, Schedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def objective(network: Network | None = None, adapter: Adapter | None = None, **fields: Any) -> PrototypicalNetwork:
    torch.manual_seed(0)
    module = PrototypicalNetwork(network or encoder(), adapter, **({"optimizer": adamw(1e-2, 0.0)} | fields))
    module.configure_model()
    return module


def episode(ways: int = 3, shots: int = 2, queries: int = 2, seed: int = 0) -> list[Document]:
    """Texts in turn of each class; of each, the first are support."""
    made = []
    for index, document in enumerate(labelled_documents(ways * (shots + queries), ways, seed)):
        ids = list(document.input_ids)
        label = 2 * ids[-1] + (index // ways >= shots)
        made.append(Document([*ids[:-1], label], document.targets, index))
    return made


def vectors_of(module: PrototypicalNetwork, made: list[Document]) -> Tensor:
    rows = []
    for document in made:
        ids = torch.as_tensor(document.input_ids)[None, :-1]
        rows.append(module.built_network(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(rows)


def near(one: Tensor, other: Tensor, distance: str) -> Tensor:
    return -((one - other) ** 2).sum() if distance == "euclidean" else F.cosine_similarity(one, other, dim=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_an_episodes_queries_are_classified_by_its_support(distance: Any, packed: bool) -> None:
    module = objective(distance=distance, scale=0.5)
    module.episodic = True
    made = episode()
    batch = pack_documents([made[5:], made[:5]]) if packed else pad_documents(made)
    ours = module.criterion(module(batch), batch)
    vectors = vectors_of(module, made)
    labels = torch.tensor([int(one.input_ids[-1]) for one in made])
    expected = torch.zeros(())
    for index in (labels % 2 == 1).nonzero().flatten().tolist():
        means = [vectors[labels == 2 * number].mean(0) for number in range(3)]
        scores = 0.5 * torch.stack([near(vectors[index], mean, distance) for mean in means])
        expected = expected + F.cross_entropy(scores[None], labels[index : index + 1] // 2)
    torch.testing.assert_close(ours.sum, expected, rtol=1e-3, atol=1e-3)
    assert int(ours.weight) == 6
    ours.sum.backward()
    assert module.log_scale.grad is not None


def test_shots_are_classified_by_the_others_in_the_batch() -> None:
    module = objective()
    made = labelled_documents(7)  # the classes have three, two and two
    made = [*made, Document([9, 9, 3], [False, False, True], 7)]  # and the fourth class one
    batch = pad_documents(made)
    ours = module.criterion(module(batch), batch)
    vectors, classes = vectors_of(module, made), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
    expected = torch.zeros(())
    for index in range(7):
        others = torch.arange(8) != index
        means = [vectors[others & (classes == number)].mean(0) for number in range(4)]
        scores = torch.stack([near(vectors[index], mean, "euclidean") for mean in means])
        expected = expected + F.cross_entropy(scores[None], classes[index : index + 1])
    torch.testing.assert_close(ours.sum, expected, rtol=1e-3, atol=1e-3)
    assert int(ours.weight) == 7
    ours.sum.backward()
    expected.backward()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.isfinite()
    assert all(one.grad.isfinite().all() for one in module.built_network.parameters() if one.grad is not None)


def test_new_classes_need_no_training() -> None:
    module = objective(scale=0.01)
    shots = labelled_documents(9)
    module.adapt([pad_documents(shots[:5]), pad_documents(shots[5:])])
    vectors = vectors_of(module, shots)
    for number in range(3):
        torch.testing.assert_close(module.prototypes[number], vectors[number::3].mean(0), rtol=1e-4, atol=1e-4)
    queries = pad_documents(labelled_documents(12, seed=3))
    with torch.no_grad():
        module.measure(queries)
        scores = -0.01 * torch.cdist(module(queries), module.prototypes) ** 2
        found = module.predict_step(queries, 0)
    values = module.metrics.compute()
    expected = torch.arange(12) % 3
    assert float(values["accuracy"]) == pytest.approx(float((scores.argmax(1) == expected).float().mean()))
    assert float(values["loss"]) == pytest.approx(float(F.cross_entropy(scores, expected)), rel=1e-3)
    assert torch.equal(found != 0, queries["labels"] != IGNORE_INDEX)


def test_no_text_is_of_a_class_without_examples() -> None:
    module = objective(scale=0.01)
    shots = [one for one in labelled_documents(9) if one.input_ids[-1] != 1]
    module.adapt([pad_documents(shots)], num_classes=4)
    with torch.no_grad():
        scores = module.scores(vectors_of(module, labelled_documents(6)), module.prototypes)
    assert scores.shape == (6, 4)
    assert scores[:, [1, 3]].isinf().all()
    assert scores[:, [0, 2]].isfinite().all()


def classification(folder: Path) -> ClassificationData:
    return ClassificationData(
        save_labelled(folder / "rows.jsonl", labelled_rows()),
        tokenizer=wordpiece_tokenizer(),
        shots=4,
        val_rows=12,
        test_rows=9,
        max_length=16,
        batches=Batches(mode="sorted", documents=5),
        reading=Reading(cache=str(folder / "cache"), processes=1),
    )


def episodes(folder: Path) -> EpisodeData:
    return EpisodeData(
        save_labelled(folder / "episodes.jsonl", labelled_rows(10, 8)),
        tokenizer=wordpiece_tokenizer(),
        ways=2,
        shots=2,
        queries=3,
        episodes=40,
        measured_episodes=10,
        max_length=16,
        reading=Reading(cache=str(folder / "cache"), processes=1),
    )


def pretrained(folder: Path) -> Pretrained:
    tiny_encoder(task="encoder", hidden_dropout_prob=0.1).save_pretrained(folder)
    return Pretrained(str(folder))


def test_means_of_the_training_texts_are_in_the_checkpoint(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "network")
    module = PrototypicalNetwork(source, LinearProbe())
    trainer = tiny_trainer(tmp_path, [])
    data = classification(tmp_path)
    trainer.fit(module, datamodule=data)
    assert 0 <= float(trainer.callback_metrics["val/accuracy"]) <= 1
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"prototypes", "log_scale"}
    expected = PrototypicalNetwork(source)
    expected.configure_model()
    expected.adapt(data.excerpt("train"))
    torch.testing.assert_close(state["prototypes"], expected.prototypes)
    (tested,) = tiny_trainer(tmp_path, []).test(
        PrototypicalNetwork(source, LinearProbe()),
        classification(tmp_path),
        ckpt_path=tmp_path / "run.ckpt",
        verbose=False,
    )
    expected.eval()
    alone = classification(tmp_path)
    alone.prepare_data()
    alone.setup("fit")
    for batch in alone.test_dataloader():
        with torch.no_grad():
            expected.measure(batch)  # type: ignore[arg-type]
    assert tested["test/accuracy"] == pytest.approx(float(expected.metrics.compute()["accuracy"]))
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_episodes_teach_to_tell_unseen_classes(tmp_path: Path) -> None:
    module = PrototypicalNetwork(encoder(), optimizer=adamw(3e-3, 0.0))
    trainer = tiny_trainer(tmp_path, [], max_epochs=3)
    data = episodes(tmp_path)
    trainer.validate(module, datamodule=data, verbose=False)
    before = float(trainer.callback_metrics["val/accuracy"])
    trainer.fit(module, datamodule=data)
    after = float(trainer.callback_metrics["val/accuracy"])
    assert after > before
    assert after > 0.7
    assert len(module.prototypes) == 0
    with pytest.raises(ValueError, match="classes of an episode mean nothing outside of it"):
        module.predict_step(next(iter(data.val_dataloader())), 0)  # type: ignore[arg-type]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "network")
    for name, data in (("episodes", episodes), ("shots", classification)):

        def module() -> PrototypicalNetwork:
            return PrototypicalNetwork(source, optimizer=adamw(), schedule=Schedule("constant"))

        check_resumes(tmp_path / name, module, lambda data=data: data(tmp_path))


def test_what_cannot_be_classified_is_refused() -> None:
    with pytest.raises(ValueError, match="scale is 0"):
        PrototypicalNetwork(encoder(), scale=0)
    module = objective()
    batch = pad_documents(labelled_documents(3))
    with pytest.raises(ValueError, match="no class has a mean yet"):
        module.measure(batch)
    module.episodic = True
    support = [one for one in episode() if int(one.input_ids[-1]) % 2 == 0]
    with pytest.raises(ValueError, match="the batch is no whole episode"):
        module.criterion(module(pad_documents(support)), pad_documents(support))
