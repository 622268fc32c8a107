"""Artifacts and finished points: written once, whole or not at all, and checked whenever they are read.

    with artifact(out, inputs={"plan": digest(plan)}, config=config, seeds={"noise": 0}) as folder:
        rows.to_csv(folder / "rows.csv")          # a hidden sibling of `out`, renamed to it when the block ends well
    manifest = verify(out)                        # InputError that names the missing, extra or changed file

    points = Points(work / "points")              # outside the declared output: outlives a killed or failed job
    rows = points.get(key)                        # None: not computed yet, or by other code, or unreadable
    points.put(key, rows)

An artifact's manifest.json holds the sha256 and size of its files, the digests of its inputs, the configuration, the
seeds and the versions of code and libraries. It has no time and no path in it: equal content has an equal manifest.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from romer.errors import InputError

MANIFEST = "manifest.json"
FOREIGN = {".snakemake_timestamp"}  # Snakemake puts this into every folder that a rule declares as its output
_serial = itertools.count()


@dataclass(frozen=True)
class Manifest:
    """What a verified artifact says of itself.

    path: its folder; digest: sha256 over its files' names and hashes, not over the manifest; files: relative path ->
    {"sha256", "size" in bytes}; inputs: name -> sha256; config: the composed configuration; code: its writer's version.
    """

    path: Path
    digest: str
    files: dict
    inputs: dict
    config: dict
    code: str


def canonical_json(value, name: str) -> str:
    """`value` as the one JSON text that equal values share (sorted keys, no spaces): what hashes are made of.

    Raises InputError, which starts with `name`, for NaN, infinities and whatever else JSON cannot hold.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_dict)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}; expected plain JSON with finite numbers") from None


def _as_dict(value):
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"found a {type(value).__name__}")


def sha256(text: str) -> str:
    """The sha256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hex. Raises InputError when there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None


@functools.cache
def code_version() -> str:
    """sha256 over the relative paths and contents of the package's *.py files: changes with any change of the code."""
    package = Path(__file__).parent
    files = {file.relative_to(package).as_posix(): file_sha256(file) for file in package.rglob("*.py")}
    return sha256(canonical_json(files, "code"))


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8): at any moment, also after a power cut, `path` is the old file or the new one."""
    path = Path(path).resolve()
    temporary = _temporary(path)
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _temporary(path: Path) -> Path:
    """A new hidden name beside `path`; what dead processes have left there under such names is deleted first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f".{path.name}.{platform.node()}"  # with the node: a process of another one cannot be seen from here
    for entry in os.scandir(path.parent):
        head, *tail = entry.name.rsplit(".", 3)
        if head == owner and len(tail) == 3 and tail[0].isdecimal() and tail[2] == "tmp" and not _alive(int(tail[0])):
            with suppress(FileNotFoundError):  # another process may be cleaning up, too
                shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
    return path.with_name(f"{owner}.{os.getpid()}.{next(_serial)}.tmp")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives and belongs to someone else
    return True


def _sync(path: Path) -> None:
    """Flushes a file, or the list of names of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def artifact(
    path: str | Path, *, inputs: Mapping[str, str], config: Mapping, seeds: Mapping | None = None
) -> Iterator[Path]:
    """Yields an empty folder that becomes the artifact `path`, with its manifest, when the block ends well.

    inputs: name -> sha256 (of a file: `file_sha256`; of an artifact: `digest`). config, seeds: plain JSON. An artifact
    that is already there is replaced; until then, and when the block fails, it stays as it was. Raises InputError
    before the block runs when `path` is neither an artifact nor an empty folder, or when an argument is malformed.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: found a file, expected an artifact's folder or nothing")
    if path.is_dir() and not (path / MANIFEST).is_file() and {entry.name for entry in path.iterdir()} - FOREIGN:
        raise InputError(f"{path}: holds files but no {MANIFEST}, so it is not replaced; move it away")
    for name, value in inputs.items():
        if not re.fullmatch("[0-9a-f]{64}", str(value)):
            raise InputError(f"{path}: input '{name}' is '{value}', expected a sha256 of 64 hex digits")
    composed = canonical_json(config, f"{path}: config")
    record = {
        "inputs": dict(inputs),
        "config": json.loads(composed),
        "config_sha256": sha256(composed),
        "seeds": json.loads(canonical_json(seeds or {}, f"{path}: seeds")),
        "code": code_version(),
        "versions": {name: _version(name) for name in ("python", "torch", "transformers", "romer")},
        "platform": platform.platform(),
    }
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if (temporary / MANIFEST).exists():
            raise InputError(f"{path}: {MANIFEST} is the manifest's own name, give that file another")
        files = _contents(temporary).items()
        record["files"] = {name: {"sha256": file_sha256(file), "size": file.stat().st_size} for name, file in files}
        for file in temporary.rglob("*"):
            _sync(file)
        write_atomic(temporary / MANIFEST, json.dumps(record, indent=2, sort_keys=True) + "\n")
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _version(name: str) -> str | None:
    try:
        return platform.python_version() if name == "python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _contents(folder: Path) -> dict[str, Path]:
    """Relative path -> file, sorted, without the manifest. Raises InputError for links: their target is not content."""
    found = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.name not in FOREIGN}
    for name, file in found.items():
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise InputError(f"{folder}: '{name}' is a link or a special file, expected a regular one")
    return {name: file for name, file in found.items() if file.is_file() and name != MANIFEST}


def _replace(new: Path, path: Path) -> None:
    """Renames the folder `new` to `path`. A folder that was there is put back when that fails."""
    old = _temporary(path)
    with suppress(FileNotFoundError):
        os.replace(path, old)  # a folder cannot be renamed onto one that holds files
    try:
        os.replace(new, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.replace(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(path: str | Path) -> Manifest:
    """Reads every file of the artifact and compares it with the manifest.

    Raises InputError that names the file which is missing, extra or changed, or what is wrong with the manifest.
    """
    path = Path(path)
    where = path / MANIFEST
    try:
        record = json.loads(where.read_bytes())
        expected = {name: entry["sha256"] for name, entry in record["files"].items()}
        inputs, config, code, config_sha256 = (record[key] for key in ("inputs", "config", "code", "config_sha256"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no artifact, {MANIFEST} is missing") from None
    except KeyError as error:
        raise InputError(f"{where}: field {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: damaged ({error}), expected a manifest in JSON") from None
    if sha256(canonical_json(config, str(where))) != config_sha256:
        raise InputError(f"{where}: field 'config' was changed, its sha256 is not {config_sha256}")
    found = _contents(path)
    for name in sorted(expected.keys() ^ found.keys()):
        state = "missing, but listed in" if name in expected else "extra, not listed in"
        raise InputError(f"{path / name}: {state} {MANIFEST}")
    for name, listed in sorted(expected.items()):
        if (actual := file_sha256(found[name])) != listed:
            raise InputError(f"{path / name}: changed, sha256 is {actual}, expected {listed}")
    return Manifest(path, sha256(canonical_json(expected, str(where))), record["files"], inputs, config, code)


def digest(path: str | Path) -> str:
    """The digest of the artifact's content, after `verify`: what another artifact gives as the hash of this input."""
    return verify(path).digest


class Points:
    """Finished points of a job, one JSON file each, kept in `folder` until the job is done.

    A point is found again only under an equal key, by the same code (`code_version`), and when its file is whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def _file(self, key: str) -> Path:
        return self.folder / f"{sha256(key)}.json"

    def get(self, key: Mapping) -> dict | None:
        """The value put under `key`, or None where there is none that can be used."""
        name = canonical_json(key, "point")
        try:
            record = json.loads(self._file(name).read_bytes())
            same = record["key"] == json.loads(name) and record["code"] == code_version()
            whole = record["sha256"] == sha256(canonical_json(record["value"], name))
        except (OSError, ValueError, KeyError, TypeError):  # absent, truncated or damaged: computed again
            return None
        return record["value"] if same and whole else None

    def put(self, key: Mapping, value: dict) -> None:
        """Stores plain JSON: dicts with text keys, lists, text, finite numbers, booleans, None.

        Raises InputError that names the point for anything else: a resumed job sees exactly what a fresh one does.
        """
        name = canonical_json(key, "point")
        if where := _not_finite(value):
            raise InputError(f"point {name}: {where}, expected finite numbers")
        check = sha256(canonical_json(value, f"point {name}"))
        record = {"key": json.loads(name), "code": code_version(), "sha256": check, "value": value}
        text = json.dumps(record, default=_as_dict)  # not sorted: a resumed table keeps the order of its columns
        if json.loads(text)["value"] != value:
            raise InputError(f"point {name}: changes when stored as JSON (a tuple, or a key that is no text?)")
        write_atomic(self._file(name), text)

    def clear(self, keys: Iterable[Mapping]) -> None:
        """Deletes the points of these keys, and the folder when it is empty then: other jobs may keep points there."""
        for key in keys:
            self._file(canonical_json(key, "point")).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _not_finite(value, where: str = "value") -> str | None:
    """Where in nested dicts and lists the first NaN or infinity is, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for at, item in items if (found := _not_finite(item, f"{where}[{at!r}]"))), None)
