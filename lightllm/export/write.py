"""Writing a network as a folder that transformers or peft loads."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightllm.compression.effects import inputs_as_they_are
from lightllm.compression.fake_quantization import low_bit_weights, quantization_schemes
from lightllm.compression.low_rank_network import factored_layers
from lightllm.compression.quantize import store_layers, stored_weight
from lightllm.export.compare import checked_difference, difference, verify
from lightllm.export.factored import check_factored, load_with_its_code, with_code
from lightllm.export.folder import written_whole
from lightllm.export.merge import merged_network
from lightllm.export.report import ExportReport
from lightllm.export.sentence_files import write_sentence_files
from lightllm.export.sparsity import sparsity_report
from lightllm.models.anatomy import transformers_network
from lightllm.models.inference import network_device
from lightllm.models.pooling import TextClassifier
from lightllm.models.progress import no_progress_bars
from lightllm.models.stop_tokens import stop_token_ids

Layout = Literal["merged", "adapter", "factored", "torchao"]


def export(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    layout: Layout = "merged",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    classifier: TextClassifier | None = None,
) -> ExportReport:
    """Write a network with its tokenizer, read it back, and compare.

    `merged` is an ordinary Hugging Face folder: configuration, weights with any adapter merged, generation
    configuration, tokenizer and chat template. `adapter` is peft's layout, for `PeftModel.from_pretrained`. `factored`
    is a Hugging Face folder that keeps thin matrices as such, with a file of code by which transformers loads it if
    `trust_remote_code` is set. `torchao` has the integers and scales of a fake-quantized network in torchao's tensors,
    which `AutoModelForCausalLM.from_pretrained` loads where torchao is installed. The network is left as it was. The
    folder appears whole or not at all, and replaces an earlier export.

    Args:
        network: A transformers model, or a peft model around one.
        tokenizer: The network's.
        folder: Where to write.
        layout: `merged`, `adapter`, `factored` or `torchao`.
        dtype: Of all but an adapter, which keeps its own; see `merged_network` for the default.
        base_model: What an adapter's configuration names as its base; by default what the base was loaded from.
        classifier: Of a network that embeds texts: what it classifies them by, see `classifier_of`.

    Raises:
        ValueError: The layout does not fit the network, `folder` is something else than an earlier export, or what was
            written does not compute what the network does.
    """
    path = Path(folder)
    with written_whole(path) as unfinished:
        if layout == "merged":
            written = _write_merged(network, tokenizer, unfinished, dtype)
        elif layout == "factored":
            written = _write_factored(network, tokenizer, unfinished, dtype)
        elif layout == "torchao":
            written = _write_torchao(network, tokenizer, unfinished, dtype)
        else:
            written = _write_adapter(network, unfinished, base_model)
        tokenizer.save_pretrained(unfinished)
        if layout != "adapter":
            write_sentence_files(network, tokenizer, unfinished, classifier)
        num_bytes = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
        report = ExportReport(path, layout, written.dtype, num_bytes, *written[1:], sparsity_report(network))
        report.write(unfinished)
    return report


class _Written(NamedTuple):
    dtype: str
    absolute: float | None
    relative: float | None


def _write_merged(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None
) -> _Written:
    saved = _save(merged_network(network, dtype), tokenizer, folder)
    return _Written(str(saved).removeprefix("torch."), *verify(folder, network, saved))


def _write_factored(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None
) -> _Written:
    check_factored(transformers_network(network))
    merged = merged_network(network, dtype, keep_factored=True)
    saved = _save(with_code(merged, folder), tokenizer, folder)
    with no_progress_bars():
        exported: nn.Module = load_with_its_code(folder, saved)
    with inputs_as_they_are(network):
        found = checked_difference(network, exported.to(network_device(network)), saved)
    return _Written(str(saved).removeprefix("torch."), *found)


def _save(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> torch.dtype:
    """Save a network that is merged; its dtype."""
    _name_special_tokens(network, tokenizer)
    with no_progress_bars():
        network.save_pretrained(folder)
    dtype = network.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _write_torchao(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None
) -> _Written:
    schemes, weights = quantization_schemes(network), low_bit_weights(network)
    if len(schemes) != 1:
        names = " and of ".join(sorted(scheme.name for scheme in schemes))
        raise ValueError(
            f"layers are of {names}, and torchao's folder is of one scheme: export with layout='merged', or as GGUF"
            if schemes
            else "nothing in this network is quantized: train with QuantizationAwareTraining, or use lightllm quantize"
        )
    merged = merged_network(network, dtype)
    store_layers(merged, schemes.pop(), weights)
    saved = _save(merged, tokenizer, folder)
    with no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    written, read = merged.state_dict(), loaded.state_dict()
    for name, tensor in written.items():
        layer = name.removesuffix(".weight")
        expected = weights[layer].dense().to(saved).float() if layer in weights else tensor
        found = stored_weight(loaded.get_submodule(layer)) if layer in weights else read[name]
        if not torch.equal(found, expected):
            raise ValueError(f"{name} is read back as another than was written: the export would be wrong")
    exported: nn.Module = loaded
    return _Written(str(saved).removeprefix("torch."), *difference(network, exported.to(network_device(network))))


def _name_special_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's special tokens where generation reads them; a configuration's own may be another's."""
    stops = stop_token_ids(network, tokenizer)
    places: list[GenerationConfig | PreTrainedConfig] = [network.config]
    if network.can_generate():
        network.generation_config.use_cache = True
        places.append(network.generation_config)
    for place in places:
        place.bos_token_id = tokenizer.bos_token_id
        place.pad_token_id = tokenizer.pad_token_id
        place.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def _write_adapter(network: nn.Module, folder: Path, base_model: str | None) -> _Written:
    if not isinstance(network, PeftModel):
        raise ValueError(
            f"layout='adapter' needs an adapter, and this {type(network).__name__} was trained without one: export "
            "with layout='merged'"
        )
    if factored_layers(network):
        raise ValueError(
            "the adapter is on thin matrices, which the network that it names as its base does not have: export with "
            "layout='merged' or 'factored'"
        )
    if any(weight.requires_grad for key, weight in network.named_parameters() if ".base_layer." in key):
        raise ValueError(
            "base weights were trained beside the adapter (train_base), which alone would not be what was trained: "
            "export with layout='merged'"
        )
    if sparsity_report(network):
        raise ValueError(
            "the adapter was trained behind a mask, which it does not carry, so that it would be loaded onto dense "
            "weights: export with layout='merged'"
        )
    name = network.active_adapter
    configuration = copy(network.peft_config[name])
    configuration.inference_mode = True
    if isinstance(configuration, LoraConfig) and not isinstance(configuration.target_modules, str | None):
        configuration.target_modules = sorted(configuration.target_modules)  # the same file from the same run
    configuration.base_model_name_or_path = base_model or configuration.base_model_name_or_path
    if not configuration.base_model_name_or_path:
        raise ValueError(
            "the base network was made from scratch, so that an adapter alone could never be loaded: export with "
            "layout='merged'"
        )
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False).items()
    }
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    configuration.save_pretrained(str(folder))
    written = load_file(file)
    if set(written) != set(tensors) or not all(torch.equal(written[key], tensors[key]) for key in tensors):
        raise ValueError("the adapter's file does not hold what was written into it: is the disk full?")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return _Written(", ".join(dtypes), None, None)
