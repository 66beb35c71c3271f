"""A network and its tokenizer again, from a run folder or from anything that `Pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightllm.runs import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lightllm.modules import LanguageModule


class Loaded(NamedTuple):
    """What the plain verbs work on."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    """What the network was made from, if that has a name."""


def load(model: str, checkpoint: str = "best") -> Loaded:
    """The network of a run folder, of a Hugging Face folder, a hub id, a GGUF file or a packaged model.

    Args:
        model: Its path or name.
        checkpoint: Of a run: `best`, `newest`, or a file.

    Raises:
        ValueError: Nothing of this name, or the run has no such checkpoint.
    """
    from lightllm.models import BuildRequest, Pretrained, load_tokenizer

    run = RunFolder(model)
    if run.exists:
        module = rebuild(run, checkpoint)
        assert module.tokenizer is not None
        return Loaded(module.built_network.eval(), module.tokenizer, module.tokenizer_source)
    network = Pretrained(model, attention="sdpa")
    tokenizer = load_tokenizer(model)
    return Loaded(network.build(BuildRequest("causal", tokenizer)).eval(), tokenizer, model)


def rebuild(run: RunFolder, checkpoint: str = "best") -> LanguageModule:
    """The run's objective with its network as it was trained: the configuration read again, the weights loaded.

    Raises:
        ValueError: The run's model is not a `LanguageModule`, or there is no such checkpoint.
    """
    import torch
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    from lightllm.models import load_tokenizer
    from lightllm.modules import LanguageModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    module = parser.instantiate_classes(parser.parse_object({"model": run.read_config()["model"]})).model
    if not isinstance(module, LanguageModule):
        raise ValueError(f"the run's model is a {type(module).__name__}, not a lightllm.modules.LanguageModule")
    if run.tokenizer.is_dir():
        module.tokenizer = load_tokenizer(str(run.tokenizer))
    module.configure_model()
    files = {"best": run.best_checkpoint, "newest": run.newest_checkpoint}
    file = files[checkpoint]() if checkpoint in files else Path(checkpoint)
    if not file.is_file():
        raise ValueError(f"no checkpoint {str(file)!r}: give best, newest or a file in {str(run.checkpoints)!r}")
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    return module
