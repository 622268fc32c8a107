"""Figure 1: how the clean, the noisy and the mended model continue the same prompts, greedily.

    with program(model, noise, realisation=0), apply(model, plan, calibration):
        texts = continuations(model, tokenizer, prompts, tokens=40)

Greedy decoding draws nothing: what differs between two continuations is the weights and the routing alone.
"""

from collections.abc import Sequence

import torch

from romer.errors import InputError


@torch.no_grad()
def continuations(model: torch.nn.Module, tokenizer, prompts: Sequence[str], tokens: int) -> list[str]:
    """What the model appends to every prompt, without it: at most `tokens` tokens, fewer where it ends the text.

    Prompts are read as they are, without special tokens, one at a time: a padded batch would move them to other cells
    of an analog KV cache. Raises InputError for a prompt without tokens and for one that, continued, would be longer
    than the model's context.
    """
    found = []
    longest = model.config.max_position_embeddings
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)  # [1, T]
        length = ids.shape[1]
        if not 0 < length <= longest - tokens:
            raise InputError(
                f"prompt {prompt[:40]!r}: {length} tokens and {tokens} to come,"
                f" expected at least one, at most {longest} together"
            )
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            temperature=None,  # a checkpoint's own settings for sampling would only cause warnings
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.eos_token_id,
        )
        found.append(tokenizer.decode(output[0, length:], skip_special_tokens=True))
    return found
