"""Continuations are the greedy ones of the model as it is at the moment, and depend on nothing else."""

import pytest
import torch

from romer import NoiseModel, ReplacementPlan, RouterCalibration, apply, profile, program
from romer.errors import InputError
from romer.evaluate.generation import continuations
from tests.conftest import tiny
from tests.test_harness import byte_tokenizer

PROMPTS = ["Once upon", "A prompt of another length"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny("qwen3", vocab_size=257)


def greedy(model, tokenizer, prompt, tokens):
    """Token by token, without a cache."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_continuations_are_greedy_and_independent(model, tokenizer):
    found = continuations(model, tokenizer, PROMPTS, 8)
    assert found == [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert found == continuations(model, tokenizer, PROMPTS[::-1], 8)[::-1]
    assert all(found) and not any(text.startswith(prompt) for text, prompt in zip(found, PROMPTS, strict=True))


def test_noise_and_routing_act_and_leave_nothing_behind(model, tokenizer, ids):
    clean = continuations(model, tokenizer, PROMPTS, 8)
    plan = ReplacementPlan.fit(profile(model, ids, 64).magnitude, 4)
    state = torch.get_rng_state()
    with program(model, NoiseModel(0.5), 0):
        vanilla = continuations(model, tokenizer, PROMPTS, 8)
        with apply(model, plan, RouterCalibration("iqr", 0.4)):
            romer = continuations(model, tokenizer, PROMPTS, 8)
            assert romer == [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(clean), tuple(vanilla), tuple(romer)}) == 3
    assert continuations(model, tokenizer, PROMPTS, 8) == clean
    assert torch.equal(state, torch.get_rng_state())


def test_settings_of_the_checkpoint_do_not_act(model, tokenizer):
    expected = continuations(model, tokenizer, PROMPTS, 8)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=1.8)
    assert continuations(model, tokenizer, PROMPTS, 8) == expected


def test_prompt_that_does_not_fit_is_named(model, tokenizer):
    assert continuations(model, tokenizer, ["a" * 120], 8)
    with pytest.raises(InputError, match="121 tokens and 8 to come.*128"):
        continuations(model, tokenizer, ["a" * 121], 8)
    with pytest.raises(InputError, match="prompt ''"):
        continuations(model, tokenizer, [""], 8)
