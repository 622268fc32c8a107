"""Accuracy on items with several endings, scored by lm-evaluation-harness's own model class."""

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def piqa_accuracy(model: torch.nn.Module, tokenizer, items: list[dict], batch: int = 16) -> float:
    """Share of PIQA items (goal, sol1, sol2, label) whose right solution has the higher log-likelihood.

    Prompt and metric are lm-eval's task `piqa` (zero-shot, `acc`). Leaves torch's global generator as it found it.
    """
    requests = [
        Instance("loglikelihood", item, (f"Question: {item['goal']}\nAnswer:", f" {item[choice]}"), index)
        for item in items
        for index, choice in enumerate(("sol1", "sol2"))
    ]
    with torch.random.fork_rng(devices=[]):
        scores = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch).loglikelihood(
            requests, disable_tqdm=True
        )
    pairs = [(scores[2 * i][0], scores[2 * i + 1][0]) for i in range(len(items))]
    right = sum((second > first) == bool(item["label"]) for item, (first, second) in zip(items, pairs, strict=True))
    return right / len(items)
