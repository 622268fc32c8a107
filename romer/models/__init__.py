"""Loads models for analog inference. Importing this package registers the native DeepSeek-MoE port with
transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import romer.models.deepseek  # noqa: F401  (registers model_type "deepseek")
import romer.routing  # noqa: F401  (registers the experts implementation "analog")
from romer.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(source: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer) of a checkpoint: a local folder or a hub id with its revision.

    The model is in evaluation mode without gradients, its experts run through the implementation `analog`. Raises
    InputError when the checkpoint is neither on this machine nor to be had, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: found {device!r}, but torch sees no CUDA device; expected cpu")
    if Path(source).exists():
        revision = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision or "main", dtype=DTYPES[dtype], experts_implementation="analog"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {source}: the checkpoint is neither a local folder nor to be had from the hub ({reason})"
        ) from None
    return model.to(device).eval().requires_grad_(False), tokenizer
