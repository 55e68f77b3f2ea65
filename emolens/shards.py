"""Files of ours, written whole and checked when read, and folders of them that a killed run continues.

A folder of shards has a ``manifest.json``, which says by what code, model, texts and options the shards are made and names each of
them, and one safetensors file a shard. A shard is done when its file is there and its checksum is right; nothing else is kept of
progress, so there is nothing to get out of step. One run at a time holds the folder; its lock dies with the process, and on some network
file systems it is one for each node. What a shard holds is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emolens._files import existing, here

FORMAT = "emolens.shards.1"
PAGE = "<!doctype html><html><head><meta charset='utf-8'><title>emolens</title></head><body>"
MANIFEST, LOCK, HELD = "manifest.json", "lock", "lock.held"
ABANDONED = 3600.0  # seconds after which a half-written file of another machine is nobody's


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors with their metadata and a checksum of both, whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with written_whole(path) as part:
        try:
            save_file(tensors, part, metadata | {"checksum": _checksum(tensors, metadata)})
        except SafetensorError as error:  # its word for a full disk
            raise OSError(f"{path}: could not be written ({error})") from error


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A file to write beside the target, moved into place at the end: a reader never sees half a file, and none is left behind."""
    path = here(path)
    path = (
        path.resolve() if path.is_symlink() else path
    )  # a link stays, and what it leads to is written
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    part = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.part")
    try:
        yield part
        part.chmod(0o644)  # safetensors makes private files; results are for sharing
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def vacant(
    path: str | Path, other: Callable[[Path], str | None], *, overwrite: bool = False
) -> Path:
    """The path of a file that is to be written, if that costs nobody anything: the one guard of all that is written.

    Args:
        other: Called with a file that is there already: in words what it holds, or None if it is only an earlier copy of what is to be written.
        overwrite: Replace it whatever it holds.

    Raises:
        FileNotFoundError: its folder is not there.
        FileExistsError: it is a folder, or a file that holds something else.
    """
    path = here(path)
    for folder in (path.parent, path.resolve().parent):  # of the file, and of what a link leads to
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no file but a device or a pipe; give the name of a file")
    if path.exists() and not overwrite and (held := other(path)) is not None:
        raise FileExistsError(
            f"{path} already holds {held}; choose another file, or overwrite=True (--overwrite)"
        )
    return path


def write_page(path: str | Path, body: str, *, overwrite: bool = False) -> None:
    """Write a view as a page of its own.

    Args:
        path: The file, in a folder that is there.
        body: HTML, in which everything that a model or a file said is escaped.
        overwrite: Replace a file that is no such page.

    Raises:
        FileExistsError: the file is there and is no such page.
    """
    vacant_page(path, overwrite=overwrite)
    with written_whole(path) as part:
        part.write_text(f"{PAGE}{body}</body></html>", encoding="utf-8")


def vacant_page(path: str | Path, *, overwrite: bool = False) -> None:
    """Whether `write_page` may write there; errors as there."""

    def other(file: Path) -> str | None:
        with file.open("rb") as page:
            ours = page.read(len(PAGE)) == PAGE.encode()
        return None if ours else "something that emolens did not write"

    vacant(path, other, overwrite=overwrite)


def vacant_folder(path: str | Path) -> Path:
    """The path of a folder that is there or can be made.

    Raises:
        FileExistsError: it is a file, or would lie in one.
    """
    path = here(path)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise FileExistsError(f"{part} is a file; give the name of a folder")
    return path


def read_safetensors(path: str | Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of ours.

    Args:
        kinds: The formats that the caller can read, the present one first.

    Raises:
        FileNotFoundError, ValueError: no such file; truncated, damaged or not safetensors; not of these kinds.
    """
    path = existing(path, "file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "another program's file")
            if found not in kinds:
                raise ValueError(
                    f"{path}: this is {found}, not {kinds[0]}{_newer(found, kinds[0])}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated one") from error
    if "checksum" in metadata and _checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError(f"{path}: damaged, its checksum is not the one that it was written with")
    return tensors, metadata


def digest_of(files: Iterable[Path]) -> str:
    """Identity of some files by what is in them (first 16 hex digits of a sha256), such as the sources that made a result."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def code_digest(*rooms: str) -> str:
    """Identity of the sources of some rooms of this package: a file, or a folder with all that is in it."""
    package = Path(__file__).parent
    found = [sorted((package / room).rglob("*.py")) or [package / room] for room in rooms]
    return digest_of(file for files in found for file in files)


def same_weights(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two files' ``info["model"]`` are of the same weights, whatever the loader, and to the precision of the coarser load."""
    if not (
        "rounded" in a and "rounded" in b
    ):  # of version 0.1, which took a sample that some processing leaves alone
        return (a["fingerprint"], a["process_weights"]) == (b["fingerprint"], b["process_weights"])
    return (
        a["fingerprint"] == b["fingerprint"]
        or a["rounded"].get(b["dtype"]) == b["fingerprint"]
        or b["rounded"].get(a["dtype"]) == a["fingerprint"]
    )


def _newer(found: str, known: str) -> str:
    stem, _, version = known.rpartition(".")
    other, _, number = found.rpartition(".")
    newer = other == stem and number.isdigit() and int(number) > int(version)
    return "; it was written by a newer emolens: upgrade to read it" if newer else ""


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(
        json.dumps(sorted((k, v) for k, v in metadata.items() if k != "checksum")).encode()
    )
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        if t.numel():
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Folder:
    """A folder of shards. `manifest["shards"]` lists their names in order."""

    path: Path
    manifest: dict[str, Any]

    def file(self, number: int) -> Path:
        """Where shard `number` is, or will be."""
        return self.path / f"{number:05d}-{self.manifest['shards'][number]}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there. One that is cut short or damaged is removed, and is missing."""
        out = []
        for number in range(len(self.manifest["shards"])):
            file = self.file(number)
            try:
                read_safetensors(file, *self.manifest["kinds"])
            except FileNotFoundError:
                out.append(number)
            except ValueError:
                file.unlink()
                out.append(number)
        return out


def read_folder(path: str | Path) -> Folder:
    """A folder of shards that is there.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: the manifest is not one, or of a newer version.
    """
    path = here(path)
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no {MANIFEST} there; this is not a folder of collected activations"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, names = manifest["format"], manifest["shards"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: not a manifest of emolens; remove the folder, or choose another"
        ) from error
    if found != FORMAT or not isinstance(names, list):
        raise ValueError(f"{file}: this is {found!r}, not {FORMAT}{_newer(str(found), FORMAT)}")
    return Folder(path, manifest)


@contextmanager
def begin(path: str | Path, manifest: dict[str, Any]) -> Iterator[Folder]:
    """Hold a folder for one run: a new one, or one that was begun with the very same manifest.

    Raises:
        FileExistsError: another process holds it; it was begun with something else (which is said); it holds other files, or is one.
        OSError: it cannot be written.
    """
    path = vacant_folder(path)
    manifest = {"format": FORMAT, **json.loads(json.dumps(manifest))}  # as it will be read back
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [
            p.name
            for p in path.iterdir()
            if p.name not in (LOCK, HELD) and not p.name.endswith(".part")
        ]
        lock = (path / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"{path}: cannot write there ({error.strerror or error}); choose another folder"
        ) from error
    with lock, _hold(lock, path):
        if (path / MANIFEST).is_file():
            found = read_folder(path).manifest
            if reason := _difference(found, manifest):
                raise FileExistsError(
                    f"{path} was begun {reason}; choose another folder, or remove this one"
                )
        elif others:
            raise FileExistsError(
                f"{path} holds other files ({others[0]}); choose an empty or a new folder"
            )
        else:
            with written_whole(path / MANIFEST) as part:
                part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for part in path.glob(".*.part"):  # of a run that was killed while it wrote
            with suppress(FileNotFoundError):
                if _abandoned(part):
                    part.unlink()
        yield Folder(path, manifest)


@dataclass(frozen=True)
class Kept:
    """What an interrupted run had finished: a JSON file a unit, written whole.

    Args:
        folder: Where; made with the first unit that is kept. None keeps nothing.
        made_by: Identity of what made them, such as code, model and options. What something else made is not taken over.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from emolens.shards import Kept
        >>> with TemporaryDirectory() as folder:
        ...     first = Kept(folder, "options 1").get("000", lambda: {"n": (1, 2)})
        ...     again = Kept(folder, "options 1").get("000", lambda: "not called")
        >>> first, again
        ({'n': [1, 2]}, {'n': [1, 2]})
    """

    folder: str | Path | None
    made_by: str

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """What was kept under a name, or what is made now and kept: in both cases as JSON gives it back."""
        found = self.find(name)
        return self.keep(name, make()) if found is None else found

    def find(self, name: str) -> Any:
        """What was kept under a name; None where there is nothing, or it is damaged or of another maker: it is made again."""
        if self.folder is None:
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._file(name).read_text(encoding="utf-8"))
            return found["result"] if found["made_by"] == self.made_by else None
        return None

    def keep(self, name: str, result: Any) -> Any:
        """Write a result under a name, and give it back as it will be read.

        Raises:
            FileExistsError: the folder is a file, or would lie in one.
        """
        data = {"made_by": self.made_by, "result": result}
        text = json.dumps(data, default=lambda number: number.item(), ensure_ascii=False)
        if self.folder is not None:
            vacant_folder(self.folder).mkdir(parents=True, exist_ok=True)
            with written_whole(self._file(name)) as part:
                part.write_text(text, encoding="utf-8")
        return json.loads(text)["result"]

    def check_own(self) -> None:
        """Refuse a folder that holds anything but what this maker kept, or a run of it was about to keep.

        Raises:
            FileExistsError: it holds the results of something else, or other files.
        """
        if self.folder is None:
            return
        folder = vacant_folder(self.folder)
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.suffix == ".part":
                continue
            try:
                whose = json.loads(file.read_text(encoding="utf-8"))["made_by"]
            except (OSError, ValueError, KeyError, TypeError):
                whose = self.made_by if file.suffix == ".json" else None  # damaged: made again
            if whose != self.made_by:
                raise FileExistsError(
                    f"{folder} holds the results of something else ({file.name}); choose another folder, or remove it"
                )

    def _file(self, name: str) -> Path:
        return here(str(self.folder)) / f"{name}.json"


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _abandoned(part: Path) -> bool:
    """Whether nobody writes a half-written file any more: its process here is gone, or it is old (a job of another node may live)."""
    host, _, process = part.name.removesuffix(".part").rpartition(".")[2].rpartition("-")
    if host == _host() and process.isdigit():
        return not psutil.pid_exists(int(process))
    return time.time() - part.stat().st_mtime > ABANDONED


@contextmanager
def _hold(lock: Any, path: Path) -> Iterator[None]:
    """Hold the folder, and say in its lock file by whom; where there is no fcntl (Windows), by what filelock finds there."""
    with ExitStack() as held:
        try:
            import fcntl
        except ImportError:
            from filelock import FileLock, Timeout

            busy, take = Timeout, lambda: held.enter_context(FileLock(path / HELD, timeout=0))
        else:
            busy, take = BlockingIOError, lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            take()
        except busy:
            lock.seek(0)
            raise FileExistsError(
                f"{path} is being written by another process ({lock.read(200).strip() or 'unknown'}); wait for it, or choose another folder"
            ) from None
        except OSError as error:  # Lustre without -o flock, NFS without its lock daemon
            raise OSError(
                f"{path}: this file system cannot lock a file ({error.strerror}); choose a folder on another one"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _difference(old: Any, new: Any, at: str = "") -> str:
    """The first thing in which two manifests differ, in words; "" if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*new, *old)):
            if found := _difference(old.get(key), new.get(key), f"{at}.{key}" if at else key):
                return found
        return ""
    if old == new:
        return ""
    return f"with {at} = {_short(old)}, now it is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
