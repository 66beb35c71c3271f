"""GGUF files, for llama.cpp and what is built on it: one file with weights, configuration, tokenizer, chat template.

The names and orders of tensors are those of llama.cpp's own converter. What is not
quantized yet is quantized by the `gguf` package.
"""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from lightllm.compression.effects import inputs_as_they_are
from lightllm.compression.fake_quantization import low_bit_weights
from lightllm.compression.fake_quantizer import LowBitWeight
from lightllm.export.compare import Difference, checked_difference, difference
from lightllm.export.gguf_tensors import BLOCK, Array, GGUFType, Stored, blocks, fitting, interleaved, is_exact, type_of
from lightllm.export.gguf_vocabulary import vocabulary
from lightllm.export.merge import merged_weights, prevailing_dtype
from lightllm.export.report import ExportReport
from lightllm.export.sparsity import sparsity_report
from lightllm.models.anatomy import transformers_network, vocabulary_size
from lightllm.models.inference import network_device
from lightllm.models.progress import no_progress_bars
from lightllm.models.stop_tokens import end_of_turn_id

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model types that can be written, and llama.cpp's names for them."""


def write_gguf(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    dtype: GGUFType | None = None,
    embedding_dtype: GGUFType | None = None,
) -> ExportReport:
    """Write a network as one GGUF file, read it back with transformers, and compare.

    Every weight that is read back must be the network's, rounded as its type says, to the last bit; the logits'
    difference, which few bits make large, is reported. A fake-quantized network's integers and scales (these in
    float16) are written as they are, where the type has as many bits and blocks of 32 fit into its groups. Vectors stay
    in F32, and matrices whose rows don't divide into blocks of 32 are F16 where fewer bits are asked for. The file
    appears whole or not at all.

    Args:
        network: A transformers model of one of `ARCHITECTURES`, or a peft model around one, which is merged.
        tokenizer: The network's; byte-level BPE.
        path: The file.
        dtype: Of the matrices; by default Q4_0 or Q8_0 for a network that is fake-quantized to as many bits, else F16.
        embedding_dtype: Of the token embedding and the head. By default 16 bits for a fake-quantized network, `Q8_0` in
            another file of 4 bits, else `dtype`.

    Raises:
        ValueError: The architecture, its variant or the tokenizer cannot be written, the `gguf` package is missing, or
            the file does not hold the network's weights.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("writing GGUF needs the package gguf: pip install 'lightllm[demo]'") from error
    path = Path(path)
    base = transformers_network(network)
    config = _checked(base.config)
    weights = dict(merged_weights(network))
    if base.config.tie_word_embeddings and torch.equal(
        weights["lm_head.weight"].float(), weights["model.embed_tokens.weight"].float()
    ):
        del weights["lm_head.weight"]
    low_bits = low_bit_weights(network)
    stored = _plan(weights, low_bits, config, dtype, embedding_dtype)
    dtype = dtype or _prevailing(stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        writer = gguf.GGUFWriter(unfinished, ARCHITECTURES[config.model_type])
        _describe(writer, config, dtype, path.stem)
        _describe_tokenizer(writer, tokenizer, vocabulary_size(base))
        _write_tensors(writer, weights, stored, config)
        found = _verify(unfinished, network, config, weights, stored)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    size, sparsity = path.stat().st_size, sparsity_report(network)
    return ExportReport(path, "gguf", dtype, size, found.absolute, found.relative, sparsity)


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Refuse what a file would not say, and what would then be computed otherwise.

    Raises:
        ValueError: The architecture, or a variant of it, cannot be written.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"a {config.model_type} network cannot be written as GGUF: known are {known}")
    variants = {
        "rope_type": (config.rope_parameters.get("rope_type", "default"), "default"),
        "hidden_act": (config.hidden_act, "silu"),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
    }
    if config.model_type == "qwen3":  # transformers reads every one back as if its heads were of this width
        variants["head_dim"] = (config.head_dim, 128)
    if config.model_type != "qwen2":  # whose queries, keys and values have biases and no field says so
        variants["attention_bias"] = (getattr(config, "attention_bias", False), False)
    for name, (value, writable) in variants.items():
        if value != writable:
            raise ValueError(f"a network with {name}={value!r} cannot be written as GGUF, only with {writable!r}")
    return config


def _plan(
    weights: dict[str, Tensor],
    low_bits: dict[str, LowBitWeight],
    config: PreTrainedConfig,
    dtype: GGUFType | None,
    embedding_dtype: GGUFType | None,
) -> list[Stored]:
    """The file's tensors, in the network's order."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stored = []
    for source, tensor in weights.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"the weight {source!r} has no place in a GGUF file of a {config.model_type} network")
        rounded = low_bits.get(source.removesuffix(".weight"))
        kind = dtype or ("F16" if rounded is None else type_of(rounded))
        if tensor.dim() == 1:
            kind = "F32"
        elif name in ("token_embd.weight", "output.weight"):
            kind = embedding_dtype or _embedding_type(tensor.dtype, dtype, bool(low_bits))
        if kind.startswith("Q") and tensor.shape[1] % BLOCK:
            kind = "F16"
        if kind == "F16" and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"the weight {source!r} has values beyond those of F16: choose BF16 or F32")
        stored.append(Stored(source, name, kind, fitting(rounded, kind)))
    return stored


def _embedding_type(own: torch.dtype, dtype: GGUFType | None, is_quantized: bool) -> GGUFType:
    if is_quantized and (dtype is None or dtype.startswith("Q")):
        return "BF16" if own == torch.bfloat16 else "F16"
    return "Q8_0" if dtype is not None and dtype.startswith("Q4") else dtype or "F16"


def _prevailing(stored: list[Stored]) -> GGUFType:
    """The type of most matrices."""
    return Counter(one.kind for one in stored if one.kind != "F32").most_common(1)[0][0]


def _describe(writer: GGUFWriter, config: PreTrainedConfig, dtype: GGUFType, name: str) -> None:
    import gguf

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # llama.cpp knows no sliding window for these: behind its end, it would attend to more.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _describe_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    found = vocabulary(tokenizer, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.split)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    writer.add_token_merges(found.merges)
    added = tokenizer("").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id in added)
    writer.add_add_eos_token(tokenizer.eos_token_id in added)
    writer.add_add_space_prefix(False)
    for token_id, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (end_of_turn_id(tokenizer), writer.add_eot_token_id),
    ):
        if token_id is not None:
            write(token_id)
    if isinstance(tokenizer.chat_template, str):
        # llama.cpp gives every vocabulary a start token, by default an ordinary word, and templates may ask for it.
        nothing = "{%- set bos_token = '' -%}" if tokenizer.bos_token_id is None else ""
        writer.add_chat_template(nothing + tokenizer.chat_template)


def _write_tensors(
    writer: GGUFWriter, weights: dict[str, Tensor], stored: list[Stored], config: PreTrainedConfig
) -> None:
    """Write one tensor after the other, so that no more than one is held in the file's form."""
    import gguf

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for source, name, kind, _ in stored:
        shape, quantization = tuple(weights[source].shape), gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            plain = np.dtype(np.float32 if kind == "F32" else np.float16)
            writer.add_tensor_info(name, shape, plain, int(np.prod(shape)) * plain.itemsize, quantization)
        else:
            shape = gguf.quants.quant_shape_to_byte_shape(shape, quantization)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in stored:
        rows = _encoded(weights[one.source], one)
        projection = one.source.split(".")[-2]
        if ARCHITECTURES[config.model_type] == "llama" and projection in heads:
            rows = interleaved(rows, heads[projection])
        writer.write_tensor_data(rows)
    writer.close()


def _encoded(tensor: Tensor, stored: Stored) -> Array:
    """A tensor's rows as the file has them: `[out, bytes]` for the types of few bits."""
    import gguf

    if stored.low_bits is not None:
        return blocks(stored.low_bits)
    array = tensor.float().cpu().contiguous().numpy()
    rows: Array = gguf.quants.quantize(array, gguf.GGMLQuantizationType[stored.kind])
    return rows


def _verify(
    path: Path, network: nn.Module, config: PreTrainedConfig, weights: dict[str, Tensor], stored: list[Stored]
) -> Difference:
    """Read the file with transformers: every weight must be the network's, rounded as its type says.

    Raises:
        ValueError: One is not, or a number of the configuration, or the logits differ by more than rounding though the
            file holds all that the network computes with.
    """
    import gguf

    with no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    written = loaded.state_dict()
    for one in stored:
        rows = _encoded(weights[one.source], one)
        rounded = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[one.kind]))
        if not torch.equal(written[one.source].float().cpu(), rounded):
            raise ValueError(f"the GGUF file's {one.name} is not the network's {one.source}: the file would be wrong")
    for name, value in _numbers(config).items():
        if not math.isclose(_numbers(loaded.config)[name], value, rel_tol=1e-6):
            raise ValueError(f"the GGUF file is read back with another {name} than {value}: the file would be wrong")
    # In the network's dtype: what float32 makes of the same weights may be far from what bfloat16 does.
    read: nn.Module = loaded
    read.to(network_device(network), prevailing_dtype(network))
    found = difference(network, read)
    if all(is_exact(weights[one.source], one) for one in stored):
        with inputs_as_they_are(network):
            checked_difference(network, read, prevailing_dtype(network))
    return found


def _numbers(config: PreTrainedConfig) -> dict[str, float]:
    """What the logits depend on beside the weights."""
    numbers = {
        name: float(getattr(config, name)) for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    }
    return {**numbers, "rope_theta": float(config.rope_parameters["rope_theta"])}
