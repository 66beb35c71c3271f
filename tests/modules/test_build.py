from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import Transformer
from tiny_checkpoint import saved
from tiny_networks import tiny_llama, tiny_tokenizer, token_rows
from tiny_objective import VOCABULARY, Batches, adamw, cut, documents, objective, scratch
from tiny_run import tiny_trainer
from torch import nn
from transformers import PreTrainedModel

from lightllm.models import (
    Adapter,
    BuildRequest,
    FromModule,
    Full,
    LoRA,
    Network,
    Pretrained,
    Record,
    Transformation,
    TransformationKind,
)
from lightllm.models.anatomy import has_adapter, transformers_network
from lightllm.models.hidden_states import hidden_states
from lightllm.modules import FineTuning
from lightllm.modules.build import BuildPlan, build_network, checkpoint_gradients, on_meta

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def build(
    network: Network | None = None,
    adapter: Adapter | None = None,
    transformations: list[Transformation] | None = None,
    task: Any = "causal",
    **fields: bool,
) -> nn.Module:
    options = {"gradient_checkpointing": False, "compile": False} | fields
    plan = BuildPlan(network or scratch(), adapter or Full(), task, **options)
    return build_network(plan, BuildRequest(task, tiny_tokenizer()), transformations or [])


@pytest.mark.parametrize("order", list(itertools.permutations(TransformationKind)))
def test_transformations_are_applied_by_kind_whatever_the_order(order: tuple[TransformationKind, ...]) -> None:
    applied: list[tuple[TransformationKind, bool]] = []

    def noting(of_kind: TransformationKind) -> Transformation:
        class Noting(Transformation):
            kind = of_kind

            def apply(self, network: nn.Module, record: Record | None) -> Record | None:
                applied.append((of_kind, has_adapter(network)))
                return None

        return Noting(of_kind.name)

    module = FineTuning(scratch(), LoRA(rank=2))
    for kind in order:
        module.register_transformation(noting(kind))
    module.configure_model()
    module.configure_model()
    assert applied == [
        (TransformationKind.STRUCTURE, False),
        (TransformationKind.LOW_RANK, False),
        (TransformationKind.MASK, True),
        (TransformationKind.FAKE_QUANTIZATION, True),
    ]


def test_a_network_is_ready_to_train_on_packed_rows() -> None:
    network = build()
    assert isinstance(network, PreTrainedModel)
    assert network.training
    assert not network.config.use_cache


def test_architectures_that_read_masks_themselves_get_one() -> None:
    network = build(scratch("doge"))
    assert isinstance(network, PreTrainedModel)
    assert network.config._attn_implementation == "sdpa"
    batch = cut(documents(), [12], packed=True)[0]
    assert hidden_states(network, batch).shape == (*batch["input_ids"].shape, 32)


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_encoders_are_no_language_models(name: str) -> None:
    with pytest.raises(ValueError, match="sees the tokens that it is to predict"):
        build(scratch(name))
    network = build(scratch(name), task="encoder")
    assert network.training


def test_heads_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="makes its logits in a way that lightllm does not know"):
        build(scratch("modernbert-decoder"))


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_llama(tied=False))
    with pytest.raises(ValueError, match="the adapter's targets include the output head"):
        build(Pretrained(source), LoRA(targets=["q_proj", "lm_head"]))
    network = build(Pretrained(source), LoRA(targets=["q_proj"], modules_to_save=["lm_head"]))
    assert has_adapter(network)


def test_nothing_is_computed_without_weights() -> None:
    with torch.device("meta"):
        network = build()
    assert on_meta(network)
    assert not on_meta(build())


def test_blocks_run_again_in_the_backward_pass() -> None:
    network, plain = build(gradient_checkpointing=True), build()
    plain.load_state_dict(network.state_dict())
    calls = []
    transformers_network(network).model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = cut(documents(), [12], packed=True)[0]
    for one in (network, plain):
        hidden_states(one, batch).square().sum().backward()
    assert len(calls) == 2
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)
    own = build(FromModule(Transformer))
    with pytest.raises(
        ValueError, match=r"works on transformers networks; Transformer should call torch.utils.checkpo"
    ):
        checkpoint_gradients(own)


def test_checkpointing_works_with_an_adapter(tmp_path: Path) -> None:
    """Whose frozen embedding gives no gradient to begin from."""
    losses = []
    for checkpointing in (False, True):
        module = objective(
            Pretrained(saved(tmp_path / "network", tiny_llama(VOCABULARY)))
            if not losses
            else Pretrained(str(tmp_path / "network")),
            LoRA(rank=4),
            gradient_checkpointing=checkpointing,
            optimizer=adamw(3e-2),
        )
        batches = cut(documents(), [12]) * 6
        trainer = tiny_trainer(tmp_path, [])
        trainer.fit(module, Batches(batches))
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_are_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    original = nn.Module.compile

    def with_eager_backend(module: nn.Module) -> None:
        compiled.append(module)
        original(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", with_eager_backend)
    network, plain = build(compile=True), build()
    base = transformers_network(network)
    assert compiled == list(base.model.layers)
    assert base.config._attn_implementation == "sdpa"  # a loop over documents would be compiled for every row
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    for sizes in ([12], [5, 7]):
        for batch in cut(documents(), sizes, packed=True):
            torch.testing.assert_close(hidden_states(network, batch), hidden_states(plain, batch), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_generation_from_a_built_network_uses_a_cache_when_asked() -> None:
    network = transformers_network(build()).eval()
    prompts = token_rows(VOCABULARY, rows=1, length=5)
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    arguments["attention_mask"] = torch.ones_like(prompts)
    slow = network.generate(prompts, use_cache=False, **arguments)
    assert torch.equal(network.generate(prompts, use_cache=True, **arguments), slow)
