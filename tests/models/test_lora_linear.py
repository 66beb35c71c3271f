from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from tiny_networks import tiny_gpt2, tiny_llama, tiny_qwen2, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightllm.models import DoRA, LoRA
from lightllm.models.lora_linear import LoraLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def pair(
    make: Callable[[], PreTrainedModel] = tiny_llama, dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[PeftModel, PeftModel]:
    """The same network with the same random adapter, ours and peft's own."""
    base = make().to(dtype)  # type: ignore[arg-type]
    configuration = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=fields.get("dropout", 0.0), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(copy.deepcopy(base), configuration)
    ours = LoRA(rank=4, alpha=8, **fields).attach(copy.deepcopy(base))
    assert isinstance(theirs, PeftModel)
    assert isinstance(ours, PeftModel)
    state = {
        name: value if "lora_" not in name else 0.1 * torch.randn_like(value)
        for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return ours.eval(), theirs.eval()


def layers(network: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def run(network: nn.Module, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(input_ids=token_rows(), use_cache=False).logits
    logits.float().tanh().sum().backward()
    return logits.detach().float(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], limit: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=limit * float(other[0].abs().max()))
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert one[1][name].dtype == gradient.dtype
        torch.testing.assert_close(one[1][name], gradient, rtol=0, atol=limit * float(gradient.abs().max()))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2])
@pytest.mark.parametrize(
    ("dtype", "autocast", "limit"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 0.1), (torch.bfloat16, False, 0.1)],
)
def test_forward_and_backward_are_pefts(make: Any, dtype: torch.dtype, autocast: bool, limit: float) -> None:
    ours, theirs = pair(make, dtype)
    num_layers = 0 if make is tiny_gpt2 else 14  # gpt2 multiplies by transposed weights, which are left to peft
    assert (len(layers(ours, LoraLinear)), len(layers(theirs, LoraLinear))) == (num_layers, 0)
    one = run(ours, autocast)
    assert all(gradient.dtype == torch.float32 for gradient in one[1].values())
    assert_same(one, run(theirs, autocast), limit)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_in_double_precision(bias: bool) -> None:
    layer = lora_layer(nn.Linear(5, 3, bias=bias).double())
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A.a.weight": a, "lora_B.a.weight": b}, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, layer.lora_A["a"].weight, layer.lora_B["a"].weight))
    with torch.no_grad():
        weight = layer.get_base_layer().weight + 2.0 * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.get_base_layer().bias))


def lora_layer(base: nn.Linear, **fields: Any) -> LoraLinear:
    layer = LoraLinear(base, "a", LoraConfig(**fields), r=2, lora_alpha=4)
    for parameter in (layer.lora_A["a"].weight, layer.lora_B["a"].weight):
        nn.init.normal_(parameter)
    return layer.to(base.weight.dtype)


def test_a_base_that_trains_gets_its_gradient() -> None:
    layer = lora_layer(nn.Linear(5, 3))
    plain = copy.deepcopy(layer)
    layer.get_base_layer().requires_grad_(True)
    plain.get_base_layer().requires_grad_(True)
    x = torch.randn(4, 5)
    layer(x).square().sum().backward()
    PeftLinear.forward(plain, x).square().sum().backward()
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_an_input_without_gradient_gets_none() -> None:
    layer = lora_layer(nn.Linear(5, 3).requires_grad_(False))
    x = torch.randn(4, 5)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A["a"].weight.grad is not None


def test_nothing_of_the_layers_width_is_kept_for_the_backward_pass() -> None:
    """What the class is for: peft keeps a float32 copy of a half-precision input."""
    kept: dict[str, set[tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, function in (("ours", LoraLinear.forward), ("peft", PeftLinear.forward)):
        layer = lora_layer(nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)).float()
        layer.get_base_layer().bfloat16()
        x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
        shapes = kept.setdefault(name, set())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: shapes.add((tuple(tensor.shape), tensor.dtype)) or tensor,  # noqa: B023
            lambda tensor: tensor,
        ):
            function(layer, x)
    assert ((7, 64), torch.float32) in kept["peft"]
    assert kept["ours"] == {
        ((7, 64), torch.bfloat16),
        ((48, 64), torch.bfloat16),
        ((2, 64), torch.bfloat16),
        ((48, 2), torch.bfloat16),
        ((7, 2), torch.bfloat16),
    }


def test_merging_and_switching_off_are_pefts() -> None:
    ours, theirs = pair()
    ids = token_rows()

    def logits(network: PeftModel) -> Tensor:
        with torch.no_grad():
            return network(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    adapted = logits(theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
        assert not torch.allclose(logits(ours), adapted)
    for network in (ours, theirs):
        network.merge_adapter()
    assert torch.equal(logits(ours), logits(theirs))
    for network in (ours, theirs):
        network.unmerge_adapter()
    torch.testing.assert_close(logits(ours), adapted, rtol=1e-4, atol=1e-4)
    plain, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in plain.state_dict().items())


def test_files_are_pefts(tmp_path: Path) -> None:
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    base = theirs.merge_and_unload()
    base.load_state_dict(
        {
            name.replace(".base_layer", "").removeprefix("base_model.model."): value
            for name, value in ours.state_dict().items()
            if "lora_" not in name
        }
    )
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert not layers(loaded, LoraLinear)
    assert len(layers(loaded, PeftLinear)) == 14
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=token_rows(), use_cache=False).logits, ours(input_ids=token_rows(), use_cache=False).logits
        )


def test_dropout_is_left_to_peft() -> None:
    ours, theirs = pair(dropout=0.5)
    results = []
    for network in (ours, theirs):
        torch.manual_seed(5)
        results.append(run(network.train()))
    assert_same(results[0], results[1], 1e-6)
    first = layers(ours, LoraLinear)[0]
    assert isinstance(first, LoraLinear)
    assert first._plain_adapter() is None


def test_variants_are_left_to_peft() -> None:
    network = DoRA(rank=4).attach(tiny_llama())
    found = layers(network, LoraLinear)
    assert len(found) == 14
    assert all(isinstance(layer, LoraLinear) and layer._plain_adapter() is None for layer in found)
    layer = lora_layer(nn.Linear(5, 3), lora_bias=True)
    assert layer._plain_adapter() is None


def test_several_adapters_and_mixed_batches_are_left_to_peft() -> None:
    ours, theirs = pair()
    for network in (ours, theirs):
        torch.manual_seed(7)
        configuration = copy.deepcopy(network.peft_config["default"])
        configuration.init_lora_weights = False
        network.add_adapter("second", configuration)
        network.base_model.set_adapter(["default", "second"])
    assert_same(run(ours), run(theirs), 1e-6)
    for network in (ours, theirs):
        network.zero_grad()
        network.set_adapter("second")
    assert_same(run(ours), run(theirs), 1e-6)
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        mixed = [
            network.eval()(input_ids=token_rows(), use_cache=False, adapter_names=names).logits
            for network in (ours, theirs)
        ]
    assert torch.equal(*mixed)


def test_compiles_without_a_break() -> None:
    layer = lora_layer(nn.Linear(5, 3).requires_grad_(False))
    x = torch.randn(4, 5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    gradient = torch.autograd.grad(compiled.square().sum(), x)[0]
    torch.testing.assert_close(compiled, layer(x))
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])
