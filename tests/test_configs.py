"""Every configuration that the package ships, run for two steps on a small network and a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import lightllm, save_small_network, settle_in

from lightllm.cli import main
from lightllm.cli.configs import CONFIGS, config_names

OVERLAYS = [name for name in config_names() if name.split("/")[0] in ("callbacks", "parallel", "trainer")]
RECIPES = [name for name in config_names() if name not in OVERLAYS]

FEW_ROWS = ["--data.reading.limit", "30", "--data.reading.val_fraction", "0.1", "--trainer.fast_dev_run", "2"]
SMALL_BERT = [
    "--model.network.fields={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}",
    "--data.tokenizer.vocab_size=300",
]
FEW_SHOTS = ["--data.shots", "2", "--data.val_rows", "20"]
SMALLER = {
    "compress/small_from_scratch.yaml": [
        "--model.network.fields={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
        "num_attention_heads: 4, max_position_embeddings: 1024}",
    ],
    "compress/structured_distill.yaml": [
        "--trainer.callbacks=[{class_path: lightllm.callbacks.StructuredPruning, init_args: {layers: 0}}]",
    ],
    "compress/all_together.yaml": ["--trainer.callbacks.group_size", "16"],
    "compress/qat_int4.yaml": ["--trainer.callbacks.group_size", "16"],
    "compress/qat_int4_full.yaml": ["--trainer.callbacks.group_size", "16"],
    "distill/cached.yaml": ["--model.network.step", "2"],
    "distill/on_policy.yaml": ["--model.network.step", "2", "--model.on_policy.max_new_tokens", "8"],
    "distill/smollm2_third.yaml": ["--model.network.step", "2"],
    "fewshot/classification.yaml": [*FEW_SHOTS, "--model.adapter.targets=[q_proj, v_proj]"],
    "fewshot/episodes.yaml": ["--data.episodes", "4", "--data.measured_episodes", "2"],
    "fewshot/linear_probe.yaml": FEW_SHOTS,
    "fewshot/prototypes.yaml": FEW_SHOTS,
    "finetune/frozen.yaml": ["--model.adapter.num_blocks", "1"],
    "pretrain/contrastive.yaml": ["--model.loss.widths=[32, 8]"],
    "pretrain/masked.yaml": SMALL_BERT,
    "pretrain/sentence_pairs.yaml": SMALL_BERT,
    "pretrain/tiny_llama.yaml": [
        "--model.network.fields={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2}",
        "--data.tokenizer.vocab_size=300",
    ],
}
"""What else must be smaller."""
TAUGHT = ["distill/cached.yaml"]
"""Recipes whose teacher is asked first."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network to stand in for the real one."""
    return save_small_network(tmp_path_factory.mktemp("small") / "network")


@pytest.fixture
def workplace(tmp_path: Path, network: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        settle_in(tmp_path, patch)
        patch.setenv("LIGHTLLM_CACHE", str(network.parent / "cache"))
        yield tmp_path


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / name).read_text())
    assert isinstance(content, dict)
    return content


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The whole configuration that a command line means."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--print_config"])
    assert not ended.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, network: Path, workplace: Path) -> None:
    parts = read(name)["model"]["init_args"]
    named = [part for part, spec in parts.items() if isinstance(spec, dict) and "name" in spec.get("init_args", {})]
    stand_in = [f"--model.{part}.name={network}" for part in named]
    arguments = ["--config", name, *FEW_ROWS, *stand_in, *SMALLER.get(name, [])]
    if name in TAUGHT:
        lightllm("teach", *arguments)
    lightllm("fit", *arguments)
    assert list(workplace.iterdir()) == [], "a trial leaves nothing behind"


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_composes_with_a_recipe(name: str, capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    base = resolved(capsys, "--config", "finetune/quickstart.yaml")
    both = resolved(capsys, "--config", "finetune/quickstart.yaml", "--config", name)
    assert (both["model"], both["data"], both["run"]) == (base["model"], base["data"], base["run"])
    for field, value in read(name)["trainer"].items():
        if field.endswith("+"):
            added = both["trainer"][field[:-1]][len(base["trainer"][field[:-1]]) :]
            assert [one["class_path"] for one in added] == [one["class_path"] for one in value]
        elif isinstance(value, dict):
            assert both["trainer"][field]["class_path"] == value["class_path"]
            assert value.get("init_args", {}).items() <= both["trainer"][field]["init_args"].items()
        else:
            assert both["trainer"][field] == value


def test_watching_callbacks_run_beside_those_of_a_recipe(network: Path, workplace: Path) -> None:
    overlay = ["--config", "callbacks/watch.yaml"]
    lightllm("fit", "--config", "finetune/quickstart.yaml", *overlay, *FEW_ROWS, "--model.network.name", network)


def test_the_tables_of_contents_are_the_files() -> None:
    assert sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.*")) == config_names()
    assert {name.split("/")[0] for name in config_names()} >= {"callbacks", "finetune", "pretrain", "trainer"}


@pytest.mark.parametrize("name", config_names())
def test_a_configuration_is_short_and_says_what_it_does(name: str) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    if name in RECIPES:
        assert read(name)["run"] == f"runs/{Path(name).stem}"
