from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from own_networks import Gru, Transformer
from resumable_run import NotingLogger
from tiny_checkpoint import saved
from tiny_networks import TEXT, tiny_gpt2, tiny_llama, tiny_tokenizer
from tiny_objective import VOCABULARY, Batches, MeasuredBatches, adamw, cut, documents, objective, scratch
from tiny_run import tiny_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from lightllm.batch import IGNORE_INDEX, Document, TextBatch, pad_documents
from lightllm.models import FromModule, LoRA, Prefix, Pretrained, PromptTuning
from lightllm.modules import CausalPretraining, FineTuning, LanguageModule, Schedule
from lightllm.modules.run_length import total_optimizer_steps

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Noting(Callback):
    """Notes what a run logs, and its gradients before each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: LanguageModule, optimizer: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


def train(folder: Path, module: LanguageModule, batches: list[TextBatch], **fields: Any) -> Noting:
    noting = Noting()
    tiny_trainer(folder, [noting], **fields).fit(module, Batches(batches))
    return noting


EXACT = {"precision": "64-true"}
"""In double precision nothing but a mistake makes a difference."""


def exact_objective(**fields: Any) -> LanguageModule:
    """Over a network that computes all of it in the precision of its weights (llama's norms are float32)."""
    return objective(scratch("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), **fields)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def assert_same(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def summed_loss(network: PreTrainedModel, made: list[Document]) -> tuple[Tensor, int]:
    """In plain PyTorch, one document after another: the sum over target tokens, and their number."""
    total, count = torch.zeros((), dtype=network.dtype), 0
    for document in made:
        ids = torch.as_tensor(document.input_ids)
        logits = network(input_ids=ids[None, :-1], use_cache=False).logits[0]
        targets = torch.as_tensor(document.targets)[1:]
        total = total + F.cross_entropy(logits[targets], ids[1:][targets], reduction="sum")
        count += int(targets.sum())
    return total, count


def by_hand(
    network: PreTrainedModel, windows: list[list[Document]], factors: list[float], clip: float | None
) -> tuple[list[float], list[list[Tensor]]]:
    """Train in plain PyTorch, a window of documents an optimizer step: losses and gradients of the steps."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    plain = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1
    )
    losses, gradients = [], []
    for window, factor in zip(windows, factors, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        total, count = summed_loss(network, window)
        (total / count).backward()
        losses.append(float(total.detach() / count))
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    return losses, gradients


def plain_network(module: LanguageModule) -> PreTrainedModel:
    network = copy.deepcopy(module.built_network)
    assert isinstance(network, PreTrainedModel)
    return network


SIZES = [3, 1, 4, 2, 2]
"""Documents of the batches of an epoch; with windows of two, the last one is short."""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("clip", "schedule"), [(None, Schedule("constant")), (0.3, Schedule("cosine", 2, floor=0.1))])
def test_training_is_that_of_a_loop_in_plain_pytorch(
    tmp_path: Path, packed: bool, clip: float | None, schedule: Schedule
) -> None:
    module, made = exact_objective(schedule=schedule), documents()
    network = plain_network(module).double()  # type: ignore[no-untyped-call]
    noting = train(
        tmp_path,
        module,
        cut(made, SIZES, packed),
        accumulate_grad_batches=2,
        max_epochs=2,
        gradient_clip_val=clip,
        **EXACT,
    )
    windows = [made[:4], made[4:10], made[10:]] * 2
    cosine = [0.0, 0.5, *(0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    losses, gradients = by_hand(network, windows, [1.0] * 6 if clip is None else cosine, clip)
    assert noting.losses == pytest.approx(losses, rel=1e-5)
    for ours, expected in zip(noting.gradients, gradients, strict=True):
        assert_same(ours, expected)
    assert_same(weights(module), weights(network))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [[6, 6], [1, 3, 1, 1, 2, 1, 1, 2], [2, 1, 3, 2, 2, 2]])
def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path: Path, sizes: list[int], packed: bool) -> None:
    """Two steps of six documents each, in one micro-batch or several unequal ones."""
    made = documents()
    whole, parts = exact_objective(), exact_objective()
    expected = train(tmp_path, whole, cut(made, [6, 6]), **EXACT)
    noting = train(tmp_path, parts, cut(made, sizes, packed), accumulate_grad_batches=len(sizes) // 2, **EXACT)
    assert noting.losses == pytest.approx(expected.losses, rel=1e-6)
    for ours, others in zip(noting.gradients, expected.gradients, strict=True):
        assert_same(ours, others)
    assert_same(weights(parts), weights(whole))


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    logger = NotingLogger()
    module = objective()
    tiny_trainer(tmp_path, [], [logger], accumulate_grad_batches=2, max_epochs=2).fit(
        module, Batches(cut(documents(), SIZES))
    )
    assert logger.steps == {step: {"train/loss", "epoch"} for step in range(6)}


class Unweighted(LanguageModule):
    """Counts each target with a weight, as a sum does that some leaf weighs."""

    def criterion(self, hidden: Tensor, batch: TextBatch) -> Any:  # type: ignore[override]
        from lightllm.modules import Loss

        weight = (batch["document_ids"] + 1).clamp(min=0).sum().float()
        return Loss(hidden.square().sum() * weight, weight)


def test_outputs_and_weights_are_the_leafs(tmp_path: Path) -> None:
    outputs: list[dict[str, Tensor]] = []

    class Reading(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, output: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(output)

    torch.manual_seed(0)
    module = Unweighted(scratch(), optimizer=adamw())
    batches = cut(documents(), SIZES)
    tiny_trainer(tmp_path, [Reading()], accumulate_grad_batches=2).fit(module, Batches(batches))
    assert [set(output) for output in outputs] == [{"loss", "loss_sum", "weight"}] * 5
    assert [float(output["weight"]) for output in outputs] == [
        float((batch["document_ids"] + 1).sum()) for batch in batches
    ]
    assert not any(output["loss_sum"].requires_grad for output in outputs)


def test_a_step_without_targets_changes_nothing_but_by_decay(tmp_path: Path) -> None:
    made = [Document([1, 2, 3], [False] * 3, index) for index in range(2)]
    module = objective(optimizer=adamw(weight_decay=0.0))
    before = [parameter.clone() for parameter in weights(module)]
    noting = train(tmp_path, module, cut(made, [2]))
    assert noting.losses == [0.0]
    assert_same(weights(module), before, 0.0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_follows(tmp_path: Path, precision: str) -> None:
    exact, half = objective(), objective()
    batches = cut(documents(), SIZES) * 3
    expected = train(tmp_path, exact, batches)
    noting = train(tmp_path, half, batches, precision=precision)
    assert half.built_network.lm_head.weight.dtype == (  # type: ignore[union-attr]
        torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    )
    assert noting.losses[:5] == pytest.approx(expected.losses[:5], rel=0.1)
    assert sum(noting.losses[-5:]) < 0.8 * sum(noting.losses[:5])


def test_an_adapter_trains_in_half_precision(tmp_path: Path) -> None:
    module = objective(adapter=LoRA(rank=4), optimizer=adamw(3e-2, 0.0))
    noting = train(tmp_path, module, cut(documents(), [12]) * 12, precision="bf16-mixed")
    assert noting.losses[-1] < 0.8 * noting.losses[0]


def test_eight_bit_optimizer_on_a_processor(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    module = objective(
        scratch(hidden_size=64, intermediate_size=128),
        optimizer=lambda parameters: AdamW8bit(parameters, lr=1e-2, weight_decay=0.1),
    )
    noting = train(tmp_path, module, cut(documents(), [12]) * 12)
    (optimizer,) = module.trainer.optimizers
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}
    assert noting.losses[-1] < 0.7 * noting.losses[0]


def fit_ddp(index: int, folder: Path, port: int) -> None:
    import os

    os.environ |= {"LOCAL_RANK": str(index), "RANK": str(index), "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
    torch.set_num_threads(1)
    made = documents()
    # Step one: five documents here and one there; step two: in two unequal micro-batches on each rank.
    mine = [cut(made[:5], [3, 2]) + cut(made[6:9], [1, 2]), cut(made[5:6] + made[:1], [1, 1])][index]
    if index:
        mine = [*cut(made[5:6], [1]), no_targets(), *cut(made[9:], [2, 1])]
    module = exact_objective(schedule=Schedule("cosine"))
    noting = Noting()
    trainer = tiny_trainer(
        folder,
        [noting],
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        **EXACT,
    )
    data = MeasuredBatches(mine, mine)
    trainer.fit(module, data)
    (values,) = trainer.validate(module, data, verbose=False)
    torch.save(
        {"weights": weights(module), "losses": noting.losses, "gradients": noting.gradients, "values": values},
        folder / f"rank{index}.pt",
    )
    # A user's own loader, whose rows Lightning deals out.
    trainer = tiny_trainer(folder, [], devices=2, strategy="ddp")
    trainer.fit(objective(), torch.utils.data.DataLoader(cut(made, [1] * 12), batch_size=None, sampler=range(12)))  # type: ignore[arg-type]
    assert total_optimizer_steps(trainer) == trainer.global_step == 6


def no_targets() -> TextBatch:
    return pad_documents([Document([1, 2, 3], [False] * 3, 99)])


def test_two_processes_are_one(tmp_path: Path) -> None:
    made = documents()
    whole = exact_objective(schedule=Schedule("cosine"))
    expected = train(tmp_path, whole, cut(made, [6, 6]), gradient_clip_val=0.5, **EXACT)
    torch.multiprocessing.start_processes(fit_ddp, (tmp_path, 29713), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{index}.pt", weights_only=True) for index in range(2)]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected.losses, rel=1e-5)
        for ours, others in zip(rank["gradients"], expected.gradients, strict=True):
            assert_same(ours, others)
        assert_same(rank["weights"], weights(whole))
    (values,) = tiny_trainer(tmp_path, []).validate(whole, MeasuredBatches([], cut(made, [12])), verbose=False)
    assert ranks[0]["values"] == ranks[1]["values"] == pytest.approx(values, rel=1e-5)


def test_measures_are_means_over_all_targets(tmp_path: Path) -> None:
    module, made = objective(), documents()
    network = plain_network(module).eval()
    (values,) = tiny_trainer(tmp_path, []).validate(module, MeasuredBatches([], cut(made, SIZES)), verbose=False)
    perplexity = Perplexity(ignore_index=IGNORE_INDEX)
    with torch.no_grad():
        for batch in cut(made, [1] * 12):
            perplexity.update(network(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
        total, count = summed_loss(network, made)
    assert values["val/perplexity"] == pytest.approx(float(perplexity.compute()), rel=1e-4)
    assert values["val/loss"] == pytest.approx(float(total) / count, rel=1e-5)
    assert set(values) == {"val/loss", "val/perplexity", "val/token_accuracy"}  # no tokenizer, no bytes
    (values,) = tiny_trainer(tmp_path, []).test(
        module, MeasuredBatches([], cut(made, [12], packed=True)), verbose=False
    )
    assert values["test/loss"] == pytest.approx(float(total) / count, rel=1e-5)


def test_a_measure_begins_anew_each_time(tmp_path: Path) -> None:
    module = objective(optimizer=adamw(0.0, 0.0))
    trainer = tiny_trainer(tmp_path, [], num_sanity_val_steps=1)
    first = trainer.validate(module, MeasuredBatches([], cut(documents(), [12])), verbose=False)
    trainer.validate(module, MeasuredBatches([], cut(documents(4, seed=5), [4])), verbose=False)
    assert trainer.validate(module, MeasuredBatches([], cut(documents(), [12])), verbose=False) == first
    batches = cut(documents(), [12])
    trainer.fit(module, MeasuredBatches(batches, batches))  # out of the inference mode that `validate` is in
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(first[0]["val/loss"])
    assert trainer.validate(module, MeasuredBatches([], batches), verbose=False) == first


@pytest.mark.parametrize("padded", [0, 7])
def test_bits_per_byte_are_those_of_the_text(tmp_path: Path, padded: int) -> None:
    """With rows of the embedding that no token has, too."""
    tokenizer = tiny_tokenizer()
    network = saved(tmp_path / "network", tiny_gpt2(len(tokenizer) + padded))
    module = objective(Pretrained(network))
    ids = [0, *tokenizer(TEXT[:140]).input_ids]
    batch = pad_documents([Document(ids, [True] * len(ids), 0)])
    data = MeasuredBatches([], [batch, batch], tokenizer=tokenizer, max_length=90)
    (values,) = tiny_trainer(tmp_path, []).validate(module, data, verbose=False)
    num_bytes = len(TEXT[:140].encode())
    assert num_bytes > 140
    expected = values["val/loss"] * (len(ids) - 1) / math.log(2) / num_bytes
    assert values["val/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert "_bytes_per_token" not in module.state_dict()


def test_a_prediction_is_each_targets_log_probability(tmp_path: Path) -> None:
    module, made = objective(), documents()
    network = plain_network(module).eval()
    batches = cut(made, SIZES)
    found = tiny_trainer(tmp_path, []).predict(module, MeasuredBatches([], batches))
    assert found is not None
    for ours, batch in zip(found, batches, strict=True):
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], use_cache=False).logits
        expected = -F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        torch.testing.assert_close(ours, expected.view_as(batch["labels"]), rtol=1e-5, atol=1e-5)
        assert (ours[batch["labels"] == IGNORE_INDEX] == 0).all()


class NeverTrains(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("the first step was taken")


def refusal(folder: Path, module: LanguageModule, data: Batches) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare its message)
        tiny_trainer(folder, [NeverTrains()]).fit(module, data)
    return str(caught.value)


def test_what_does_not_fit_together_is_refused_before_the_first_step(tmp_path: Path) -> None:
    batches = cut(documents(), SIZES)
    tokenizer = tiny_tokenizer()

    def fresh(network: Any = None, adapter: Any = None, **fields: Any) -> LanguageModule:
        return FineTuning(network or scratch(), adapter, **fields)

    assert refusal(tmp_path, fresh(), Batches(batches, tokenizer=tokenizer)) == (
        f"the tokenizer has {len(tokenizer)} tokens and the network embeds 40: they do not belong together; leave "
        "data.tokenizer out to take the network's own"
    )
    assert refusal(tmp_path, fresh(), Batches(batches, max_length=65)) == (
        "data.max_length is 65, but the network has positions for 64 only: lower it"
    )
    assert "positions for 60 only" in refusal(tmp_path, fresh(adapter=PromptTuning(4)), Batches(batches, max_length=61))
    for adapter in (Prefix(2), PromptTuning(2)):
        assert refusal(tmp_path, fresh(adapter=adapter), Batches(batches, mode="packed")) == (
            f"{type(adapter).__name__} puts something before every row, so a row can hold one document only: set "
            "data.batches.mode to sorted"
        )
    assert "BloomForCausalLM does not tell packed documents apart" in refusal(
        tmp_path, fresh(scratch("bloom")), Batches(batches, mode="packed")
    )
    assert "BertLMHeadModel sees the tokens that it is to predict" in refusal(
        tmp_path, fresh(scratch("bert")), Batches(batches)
    )
    assert "takes its vocabulary from the data's tokenizer" in refusal(
        tmp_path, CausalPretraining(type(scratch())("llama-1m")), Batches(batches)
    )
    assert "do not fit into a run of 5 steps" in refusal(
        tmp_path, fresh(schedule=Schedule("linear", 5)), Batches(batches)
    )
    with pytest.raises(ValueError, match="Prefix does not work with gradient_checkpointing: leave it off"):
        fresh(adapter=Prefix(2), gradient_checkpointing=True)


def test_networks_that_cannot_pack_train_on_sorted_rows(tmp_path: Path) -> None:
    noting = train(tmp_path, objective(scratch("bloom")), cut(documents(), [12]) * 12)
    assert noting.losses[-1] < 0.7 * noting.losses[0]


@pytest.mark.parametrize(
    ("network", "packed", "adapter"),
    [
        (FromModule(Gru, head="out"), False, None),
        (FromModule(Transformer), True, None),
        (FromModule(Transformer), True, LoRA(rank=4)),
    ],
)
def test_a_module_of_ones_own_trains(tmp_path: Path, network: Any, packed: bool, adapter: Any) -> None:
    torch.manual_seed(0)
    module = FineTuning(network, adapter, optimizer=adamw(3e-2))
    batches = cut(documents(), [12], packed) * 12
    noting = Noting()
    data = MeasuredBatches(
        batches, batches[:1], tokenizer=tiny_tokenizer(), mode="packed" if packed else "sorted", max_length=128
    )
    trainer = tiny_trainer(tmp_path, [noting])
    trainer.fit(module, data)
    assert noting.losses[-1] < 0.9 * noting.losses[0]
    assert float(trainer.callback_metrics["val/loss"]) < noting.losses[0]


def test_a_recurrent_module_is_refused_packed_rows(tmp_path: Path) -> None:
    data = Batches(cut(documents(), [12], packed=True), tokenizer=tiny_tokenizer(), mode="packed")
    assert "does not tell packed documents apart" in refusal(tmp_path, FineTuning(FromModule(Gru, "out")), data)


def test_the_tokenizer_is_the_datas_or_the_networks(tmp_path: Path) -> None:
    source = saved(tmp_path / "network")
    module = FineTuning(Pretrained(source))
    assert module.tokenizer_source == source
    assert FineTuning(scratch()).tokenizer_source is None
    tiny_trainer(tmp_path, [], limit_train_batches=1).fit(module, Batches(cut(documents(), SIZES)))
    assert module.tokenizer is not None
    assert len(module.tokenizer) == len(tiny_tokenizer())
    module = FineTuning(Pretrained(source))
    tokenizer = tiny_tokenizer()
    tiny_trainer(tmp_path, [], limit_train_batches=1).fit(module, Batches(cut(documents(), SIZES), tokenizer=tokenizer))
    assert module.tokenizer is tokenizer


def test_the_network_is_built_once() -> None:
    module = FineTuning(scratch())
    with pytest.raises(RuntimeError, match="the network is not built yet: it is from configure_model on"):
        _ = module.built_network
    module.configure_model()
    network = module.built_network
    module.configure_model()
    assert module.built_network is network


def test_the_default_optimizer_and_a_trial_run(tmp_path: Path) -> None:
    """A trial of one step is not too short for any schedule."""
    torch.manual_seed(0)
    module = FineTuning(scratch(), schedule=Schedule("cosine", 100))
    batches = cut(documents(), SIZES)
    tiny_trainer(tmp_path, [], fast_dev_run=True).fit(module, MeasuredBatches(batches, batches))
    (optimizer,) = module.trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["fused"]
    assert optimizer.param_groups[0]["lr"] == 3e-4


def test_everything_is_in_the_log_file(tmp_path: Path) -> None:
    batches = cut(documents(), SIZES)
    logger = CSVLogger(tmp_path / "run", name="", version="")
    tokenizer = tiny_tokenizer()
    module = objective(Pretrained(saved(tmp_path / "network", tiny_llama())))
    tiny_trainer(tmp_path, [], [logger], max_epochs=2).fit(
        module, MeasuredBatches(batches, batches, tokenizer=tokenizer)
    )
    logger.save()
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "val/token_accuracy"} <= set(header)
    assert len(tokenizer) > VOCABULARY
