from __future__ import annotations

import pytest
import torch
from tiny_networks import tiny_llama
from tiny_run import tiny_batches
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.losses import attention_relations
from lightllm.models.hidden_states import hidden_states
from lightllm.modules import EmbeddingLoss, HiddenStateLoss, RelationLoss
from lightllm.modules.inner_losses import InnerLosses


def wide_llama() -> LlamaForCausalLM:
    """A teacher of four layers of width 48."""
    fields = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**(tiny_llama().config.to_dict() | fields | {"head_dim": 12}))).eval()


def batch() -> TextBatch:
    (batch,) = tiny_batches(1)
    batch["labels"][0, :3] = IGNORE_INDEX
    return batch


def run(losses: InnerLosses, student: torch.nn.Module, teacher: torch.nn.Module) -> Tensor:
    losses.join(student, teacher)
    with losses.watch_student(student) as ours:
        hidden_states(student, batch())
    with torch.no_grad(), losses.watch_teacher(teacher) as theirs:
        hidden_states(teacher, batch())
    return losses(ours, theirs, batch())


@pytest.mark.parametrize("positions", ["targets", "all"])
def test_hidden_states_of_the_same_width(positions: str) -> None:
    student, teacher = tiny_llama(), tiny_llama()
    loss = HiddenStateLoss(weight=0.5, layers={0: 0, 1: -1}, positions=positions)
    given = batch()
    chosen = given["labels"] != IGNORE_INDEX if positions == "targets" else given["document_ids"] != PADDING_DOCUMENT
    calls = {"input_ids": given["input_ids"], "position_ids": given["position_ids"], "output_hidden_states": True}
    with torch.no_grad():
        before_norm: list[Tensor] = []
        hook = teacher.model.norm.register_forward_hook(lambda _, inputs, __: before_norm.append(inputs[0]))
        ours, theirs = student(**calls).hidden_states, teacher(**calls).hidden_states
        hook.remove()
    pairs = ((ours[0], theirs[0]), (ours[1], before_norm[0]))
    expected = 0.5 / 2 * sum(((a - b)[chosen] ** 2).mean(-1).sum() for a, b in pairs)
    result = run(losses := InnerLosses(loss, None), student, teacher)
    torch.testing.assert_close(result, expected)
    assert not list(losses.parameters())
    result.backward()
    assert student.model.embed_tokens.weight.grad is not None
    assert student.model.layers[1].mlp.up_proj.weight.grad is None


def test_layers_are_spread_and_other_widths_projected() -> None:
    student, teacher = tiny_llama(), wide_llama()
    losses = InnerLosses(HiddenStateLoss("cosine"), None)
    result = run(losses, student, teacher)
    assert {name: tuple(parameter.shape) for name, parameter in losses.named_parameters()} == {
        "projections.1.weight": (48, 32),
        "projections.2.weight": (48, 32),
    }
    result.backward()
    assert all(parameter.grad is not None for parameter in losses.parameters())
    assert 0 < float(result.detach()) < 2 * 13  # a cosine per target
    with losses.watch_teacher(teacher) as theirs:
        hidden_states(teacher, batch())
    assert sorted(theirs.hidden) == [2, 4]


def test_relations_between_other_widths() -> None:
    student, teacher = tiny_llama(), wide_llama()
    relations = RelationLoss(weight=3.0, layers={1: 2}, vectors=("query", "value"), num_heads=4, positions="all")
    result = run(InnerLosses(None, relations), student, teacher)
    given, document = batch(), torch.zeros(2, 8)
    expected = torch.zeros(())
    for kind in ("q_proj", "v_proj"):
        vectors = []
        for network, block in ((student, 0), (teacher, 1)):
            layer = network.model.layers[block]
            hidden = network(given["input_ids"], output_hidden_states=True).hidden_states[block]
            vectors.append(getattr(layer.self_attn, kind)(layer.input_layernorm(hidden)))
        chosen = given["document_ids"] != PADDING_DOCUMENT
        expected = expected + 3.0 / 2 * attention_relations(*vectors, document, chosen, 4)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_embeddings_beside_hidden_states_are_projected_by_themselves(kind: str) -> None:
    student, teacher, given = tiny_llama(), wide_llama(), batch()
    losses = InnerLosses(HiddenStateLoss(layers={0: 1, 2: 4}), None, EmbeddingLoss(kind, 0.25, "all"))
    both = run(losses, student, teacher)
    alone = InnerLosses(None, None, EmbeddingLoss(kind, 0.25, "all"))
    run(alone, student, teacher)
    assert {name for name, _ in losses.named_parameters()} == {
        f"projections.{name}.weight" for name in ("0", "2", "embedding")
    }
    alone.load_state_dict({"projections.embedding.weight": losses.projections["embedding"].weight})
    with alone.watch_student(student) as ours, alone.watch_teacher(teacher) as theirs:
        hidden_states(student, given)
        hidden_states(teacher, given)
    chosen = given["document_ids"] != PADDING_DOCUMENT
    pair = (
        student.model.embed_tokens(given["input_ids"])[chosen] @ losses.projections["embedding"].weight.t(),
        teacher.model.embed_tokens(given["input_ids"])[chosen],
    )
    values = (pair[0] - pair[1]).square().mean(-1) if kind == "mse" else 1 - torch.cosine_similarity(*pair, dim=-1)
    expected = 0.25 * values.sum()
    torch.testing.assert_close(alone(ours, theirs, given), expected)
    assert both > expected + 0.01


def test_nothing_to_compare_is_zero() -> None:
    assert run(InnerLosses(None, None), tiny_llama(), tiny_llama()) == 0.0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="give a weight of at least 0"):
        InnerLosses(HiddenStateLoss(weight=-1.0), None)
    with pytest.raises(ValueError, match="and layers or null"):
        InnerLosses(None, RelationLoss(layers={}))
    with pytest.raises(ValueError, match="give a weight of at least 0"):
        InnerLosses(None, None, EmbeddingLoss(weight=-1.0))
    with pytest.raises(ValueError, match=r"relations\.vectors is empty"):
        InnerLosses(None, RelationLoss(vectors=()))
    with pytest.raises(ValueError, match="no layer 3 in LlamaForCausalLM"):
        InnerLosses(HiddenStateLoss(layers={3: 1}), None).join(tiny_llama(), tiny_llama())
