"""A folder of thin matrices that transformers loads, with a file of code beside the weights that needs nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightllm.compression.low_rank_network import factored_layers

MODULE = "modeling_factored"
"""The file of code, without its ending."""

_CODE = '''"""{architecture} with layers of two thin matrices, as they were trained.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

`layer_ranks` of the configuration names the layers and the rank of each.
"""

from torch import nn
from transformers import {config}, {architecture}


class FactoredLinear(nn.Module):
    def __init__(self, layer, rank):
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)

    def forward(self, x):
        return self.up(self.down(x))


class Factored{config}({config}):
    # A name of its own, so that nobody loads it as a {model_type}, with random weights where the thin ones are.
    model_type = "factored_{model_type}"


class Factored{architecture}({architecture}):
    config_class = Factored{config}

    def __init__(self, config):
        super().__init__(config)
        for name, rank in config.layer_ranks.items():
            parent, _, child = name.rpartition(".")
            module = self.get_submodule(parent)
            setattr(module, child, FactoredLinear(getattr(module, child), rank))
        self.post_init()
'''


def with_code(merged: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Write the code into a folder, and make a network of its class, to be saved there.

    Args:
        merged: A network without adapters that keeps its thin matrices; its weights are shared.
        folder: Where the weights are going to be.

    Raises:
        ValueError: The network has no thin matrices, or its own code is not transformers'.
    """
    check_factored(merged)
    names = {"architecture": type(merged).__name__, "config": type(merged.config).__name__}
    model_type = merged.config.model_type
    (folder / f"{MODULE}.py").write_text(_CODE.format(**names, model_type=model_type), encoding="utf-8")
    auto_class = "AutoModelForCausalLM" if merged.can_generate() else "AutoModel"
    fields = merged.config.to_dict() | {
        "model_type": f"factored_{model_type}",
        "layer_ranks": {name: layer.rank for name, layer in factored_layers(merged).items()},
        "auto_map": {
            "AutoConfig": f"{MODULE}.Factored{names['config']}",
            auto_class: f"{MODULE}.Factored{names['architecture']}",
        },
    }
    architecture = _class(folder, f"Factored{names['architecture']}")
    assert architecture.config_class is not None
    with torch.device("meta"):
        network = architecture(architecture.config_class.from_dict(fields))
    network.load_state_dict(merged.state_dict(), strict=True, assign=True)
    network.tie_weights()
    if network.can_generate():
        network.generation_config = merged.generation_config
    return network.eval()


def has_our_code(folder: Path) -> bool:
    """Whether a folder's code is, to the letter, what `with_code` would write for it, so that it can be run safely."""
    file, config = folder / f"{MODULE}.py", folder / "config.json"
    if not file.is_file() or not config.is_file():
        return False
    fields = json.loads(config.read_text(encoding="utf-8"))
    classes = [reference.removeprefix(f"{MODULE}.Factored") for reference in fields.get("auto_map", {}).values()]
    if len(classes) != 2 or not all(re.fullmatch(r"\w+", name) for name in classes):
        return False
    names = dict(zip(("config", "architecture"), classes, strict=True))
    model_type = str(fields.get("model_type")).removeprefix("factored_")
    return file.read_text(encoding="utf-8") == _CODE.format(**names, model_type=model_type)


def check_factored(network: PreTrainedModel) -> None:
    """Refuse what cannot be written so.

    Raises:
        ValueError: See `with_code`.
    """
    if not factored_layers(network):
        raise ValueError(
            "layout='factored' is for networks whose layers are thin matrices (LowRankDecomposition), and this one has "
            "none: export with layout='merged'"
        )
    if not type(network).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{type(network).__name__} is no class of transformers, on which the exported code could build: export "
            "with layout='merged'"
        )


def load_with_its_code(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load such a folder by its own code, of which no copy is left in transformers' cache of remote code."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    network = _class(folder, name).from_pretrained(folder, dtype=dtype)
    assert isinstance(network, PreTrainedModel)
    return network


def _class(folder: Path, name: str) -> type[PreTrainedModel]:
    """A class of the code in a folder."""
    module_name = f"{MODULE}_of_an_export"
    spec = importlib.util.spec_from_file_location(module_name, folder / f"{MODULE}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where transformers looks for what a class's annotations mean
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[module_name]
    found: type[PreTrainedModel] = getattr(module, name)
    return found
