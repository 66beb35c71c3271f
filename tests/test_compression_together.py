"""Every way to compress with every other, in one run: what was trained is what is exported."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import forked_lightllm, lightllm, save_chats, save_small_network, settle_in
from compressed_run import (
    FULL,
    LEDGER,
    LORA,
    MASKS,
    QAT,
    WANDA,
    Material,
    assert_exported_as_trained,
    assert_masked,
    assert_on_grid,
    assert_same_weights,
    fit,
    logits,
    part,
    recipe,
)
from killable_run import equal, kill, wait_until_training
from transformers import AutoModelForCausalLM

from lightllm.cli.rebuild import load
from lightllm.compression.effects import effective_layers, inputs_as_they_are
from lightllm.compression.ledger import Ledger
from lightllm.export import export


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    return Material(save_small_network(folder / "network"), save_chats(folder / "chats.jsonl", 40))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, material: Material) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        patch.setenv("LIGHTLLM_CACHE", str(material.network.parent / "cache"))
        yield tmp_path


COMBINATIONS = [
    pytest.param(lora, mask, quantized, distilled, id="-".join(names))
    for lora, mask, quantized, distilled in itertools.product((False, True), MASKS, (False, True), (False, True))
    for names in [
        ("lora" if lora else "full", mask, "qat" if quantized else "float", "distilled" if distilled else "tuned")
    ]
]


@pytest.mark.parametrize(("lora", "mask", "quantized", "distilled"), COMBINATIONS)
def test_every_combination_is_exported_as_it_was_trained(
    material: Material, lora: bool, mask: str, quantized: bool, distilled: bool
) -> None:
    masking = MASKS[mask]
    callbacks = [LEDGER]
    callbacks += [part(QAT, start=1)] if quantized else []
    callbacks += [] if masking is None else [part(WANDA, begin=1, **masking)]
    config = recipe(material, callbacks, LORA if lora else FULL, distilled)
    state = fit(config)
    assert_exported_as_trained("run", None if masking is None else 0.5, quantized)
    if mask == "2:4":
        exported = AutoModelForCausalLM.from_pretrained("run/export")
        for name in effective_layers(load("run").network):
            assert ((exported.get_parameter(f"{name}.weight").unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()
    rows = [row.key for row in Ledger("run/ledger.jsonl").rows]
    steps = [("WandaPruning", 1)] * (masking is not None)
    steps += [("QuantizationAwareTraining", 1)] * quantized
    assert rows == [("dense", 0), *[("teacher", 0)] * distilled, *steps, ("trained", 4)]
    if len(callbacks) > 2:
        assert_same_weights(
            state, fit(recipe(material, callbacks[::-1], LORA if lora else FULL, distilled), "reversed")
        )
        assert [row.key for row in Ledger("reversed/ledger.jsonl").rows] == rows


STRUCTURED = {
    "class_path": "lightllm.callbacks.StructuredPruning",
    "init_args": {"heads": 1, "neurons": 16, "num_documents": 8},
}
LOW_RANK = {
    "class_path": "lightllm.callbacks.LowRankDecomposition",
    "init_args": {"ranks": {"by_layer": {"mlp": 16}}, "num_documents": 8},
}


@pytest.mark.parametrize("distilled", [False, True])
def test_a_smaller_network_is_adapted_and_masked(material: Material, distilled: bool) -> None:
    callbacks = [part(WANDA, begin=2, pattern="2:4"), LEDGER, STRUCTURED]
    state = fit(recipe(material, callbacks, LORA, distilled))
    assert_exported_as_trained("run", 0.5, quantized=False)
    rows = Ledger("run/ledger.jsonl").rows
    keys = [("dense", 0), ("StructuredPruning", 0), *[("teacher", 0)] * distilled, ("WandaPruning", 2), ("trained", 4)]
    assert [row.key for row in rows] == keys
    assert rows[1].parameters < rows[0].parameters
    assert rows[-1].parameters == rows[1].parameters
    assert_same_weights(state, fit(recipe(material, callbacks[::-1], LORA, distilled), "reversed"))


EVERYTHING = [part(STRUCTURED, neurons=0), LOW_RANK, part(WANDA, begin=1, pattern="2:4"), part(QAT, start=2)]


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("callbacks", [[LOW_RANK, EVERYTHING[3]], EVERYTHING], ids=["thin and rounded", "everything"])
def test_thin_matrices_are_adapted_masked_and_rounded(
    material: Material, callbacks: list[dict[str, Any]], adapter: dict[str, Any]
) -> None:
    config = recipe(material, [*callbacks, LEDGER], adapter, distilled=True)
    state = fit(config)
    rows = Ledger("run/ledger.jsonl").rows
    names = [one["class_path"].rpartition(".")[2] for one in callbacks]
    assert [row.step for row in rows if row.step != "teacher"] == ["dense", *names, "trained"]
    thin = names.index("LowRankDecomposition")
    assert rows[thin + 1].parameters == rows[thin].parameters - 2 * 3 * (32 * 48 - 16 * (32 + 48))
    config["trainer"]["callbacks"] = [LEDGER, *callbacks[::-1]]
    assert_same_weights(state, fit(config, "reversed"))

    loaded = load("run", "newest")
    with inputs_as_they_are(loaded.network):
        trained = logits(loaded.network)
    for layout in ("merged", "factored"):
        export(loaded.network, loaded.tokenizer, f"run/{layout}", layout=layout, dtype=torch.float32)  # type: ignore[arg-type]
        exported = load(f"run/{layout}").network
        assert (logits(exported) - trained).abs().max() <= 1e-5 * trained.abs().max()
    layers = effective_layers(loaded.network)
    assert len(layers) == 2 * (4 + 3 * 2)
    for name, layer in layers.items():
        weight = exported.get_parameter(f"{name}.weight").detach()
        assert_on_grid(weight, layer)
        if "WandaPruning" in names:
            assert_masked(weight, layer, 0.5)


SPARSE_GPT = {"class_path": "lightllm.callbacks.SparseGPTPruning", "init_args": {"num_documents": 8, "pattern": "2:4"}}
CUBIC = {
    "class_path": "lightllm.callbacks.MagnitudePruning",
    "init_args": {"sparsity": 0.5, "schedule": "cubic", "begin": 0, "end": 3, "every_n_steps": 1},
}
OTHERS = {
    "weights that stay change": ([SPARSE_GPT, QAT], FULL),
    "frozen weights that stay change": ([SPARSE_GPT, QAT], LORA),
    "scales freeze while weights go": ([CUBIC, part(QAT, start=1, freeze_scales=2)], FULL),
    "scales of a sum freeze": ([CUBIC, part(QAT, start=1, freeze_scales=2)], LORA),
    "the base trains too": ([CUBIC, part(QAT, start=1, train_base=True)], LORA),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_prune_and_to_round(material: Material, name: str) -> None:
    callbacks, adapter = OTHERS[name]
    config = recipe(material, callbacks, adapter)
    state = fit(config)
    assert_exported_as_trained("run", 0.5, quantized=True)
    config["trainer"]["callbacks"] = callbacks[::-1]
    assert_same_weights(state, fit(config, "reversed"))


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
@pytest.mark.parametrize("before_the_adapter", [[], EVERYTHING[:2]], ids=["all together", "everything"])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(
    material: Material, before_the_adapter: list[dict[str, Any]]
) -> None:
    callbacks = [part(QAT, start=3, freeze_scales=9), LEDGER, part(WANDA, begin=2, pattern="2:4"), *before_the_adapter]
    config = recipe(material, callbacks, LORA, True, max_steps=14, val_check_interval=4)
    fit(config, "whole")
    Path("killed.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", "killed.yaml", "--run", "killed", "--resume", "auto"]
    chance, killed = random.Random(3), 0
    for step in sorted(chance.sample(range(12), 5)):
        process = forked_lightllm(*arguments)
        wait_until_training(process, Path("killed"), step)
        time.sleep(chance.uniform(0, 0.05))
        kill(process)
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3  # a run may end before this process gets its turn to kill it
    process = forked_lightllm(*arguments)
    process.join()
    assert process.exitcode == 0
    ours, theirs = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("killed", "whole"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_numbers", "transformations"):
        assert equal(ours[key], theirs[key]), key
    assert Ledger("killed/ledger.jsonl").rows == Ledger("whole/ledger.jsonl").rows
    if not before_the_adapter:
        assert_exported_as_trained("killed", 0.5, quantized=True)


def test_files_of_few_bits_are_rows_of_the_ledger(material: Material, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    fit(recipe(material, [part(QAT, start=1), part(WANDA, pattern="2:4"), LEDGER], LORA))
    lightllm("export", "run", "--format", "torchao", "--checkpoint", "newest")
    assert "export-torchao" in capsys.readouterr().out
    *_, trained, stored = Ledger("run/ledger.jsonl").rows
    assert (trained.step, stored.step) == ("trained", "export-torchao")
    assert stored.loss == pytest.approx(trained.loss, rel=1e-5), "torchao rounds activations as they were in training"
    assert (stored.parameters, stored.nonzero_parameters) == (trained.parameters, trained.nonzero_parameters)
    assert stored.weight_bytes < 0.75 * trained.weight_bytes, "a byte a weight; the embedding stays in float32"
