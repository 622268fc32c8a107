"""Our way of scoring gives lm-eval's own numbers, on any state of the model, and computes no logits in vain."""

import dataclasses

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bootstrap_stderr, mean, perplexity
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import hash_string
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from romer import NoiseModel, ReplacementPlan, RouterCalibration, apply, profile, program
from romer.adc import Adc, Converter
from romer.arrays import calibrate_ranges
from romer.errors import InputError
from romer.evaluate.benchmarks import lead_documents, load
from romer.evaluate.harness import Scorer, evaluate, nll, prepare, standard_error
from romer.placement import Placement
from tests.conftest import ARCHITECTURES, tiny

WINDOW = 32
PIQA = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing to it, softly", "label": 0},
    {"goal": "boil an egg", "sol1": "x", "sol2": "put it into hot water", "label": 1},
    {"goal": "sit down", "sol1": "use a chair", "sol2": "use a cat", "label": 0},
]
ARC = [
    {
        "id": str(i),
        "question": question,
        "choices": {"text": choices, "label": ["A", "B", "C", "D"][: len(choices)]},
        "answerKey": key,
    }
    for i, (question, choices, key) in enumerate(
        [("Which is hot?", ["ice", "snow", "fire", "a cold stone"], "C"), ("What falls?", ["rain", "up", "r"], "A")]
    )
]
LAMBADA = [{"text": "she opened the door and saw the door"}, {"text": "one two three four"}]
LEADS = lead_documents(["A lead of some thirty words, longer than a window. " * 3, "Short."])


def byte_tokenizer():
    """Bytes, and an end of text that is also the beginning."""
    vocabulary = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(params=ARCHITECTURES)
def double(request):
    """Every architecture in float64, where sums in another order differ by 1e-12 (k/E so that no grouped product, which
    has no float64, is used)."""
    return tiny(request.param, vocab_size=257, num_experts_per_tok=4).double()


@pytest.fixture
def single():
    return tiny("olmoe", vocab_size=257)


def loglikelihoods(pairs):
    return [Instance("loglikelihood", {}, pair, i, metadata=("test", i, 1)) for i, pair in enumerate(pairs)]


def texts(documents):
    return [Instance("loglikelihood_rolling", {}, (d["page"],), i, ("test", i, 1)) for i, d in enumerate(documents)]


PAIRS = [
    ("What?", " this"),
    ("What?", " that thing"),
    ("What?", " t"),
    ("Another question", " answer"),
    ("What?", " this"),  # a neighbour no more
    ("", "no context"),
    ("trailing space ", "x"),
]


def close(found, expected, tolerance):
    assert len(found) == len(expected)
    for (p, greedy), (q, same) in zip(found, expected, strict=True):
        assert abs(p - q) <= tolerance * max(1, abs(q)) and greedy == same


def reference(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=128)


def test_loglikelihoods_are_lm_evals(double, tokenizer):
    expected = reference(double, tokenizer).loglikelihood(loglikelihoods(PAIRS), disable_tqdm=True)
    for batch_tokens in (1, 24, 4096):  # one row a batch, no context shared; some; all
        scorer = Scorer(double, tokenizer, batch_tokens)
        close(scorer.loglikelihood(loglikelihoods(PAIRS), disable_tqdm=True), expected, 1e-6)


def test_greedy_continuations_are_recognised(double, tokenizer):
    """What the model itself would say is greedy, in shared rows too."""
    context = tokenizer("Once upon")["input_ids"]
    said = double.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    said = said[len(context) :].tolist()
    requests = [(("Once upon", str(i)), context, c) for i, c in enumerate(([5, 6], said, said[:1] + [9]))]
    assert [greedy for _, greedy in Scorer(double, tokenizer)._loglikelihood_tokens(requests)] == [False, True, False]


def test_rolling_loglikelihoods_are_lm_evals(double, tokenizer):
    lm = HFLM(pretrained=double, tokenizer=tokenizer, batch_size=2, max_length=WINDOW)
    expected = lm.loglikelihood_rolling(texts(LEADS), disable_tqdm=True)
    found = Scorer(double, tokenizer, 100, WINDOW).loglikelihood_rolling(texts(LEADS))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name, documents", [("piqa", PIQA), ("arc_easy", ARC), ("lambada_openai", LAMBADA)])
def test_scores_are_lm_evals(double, tokenizer, name, documents):
    """Every metric of the stock task, through lm-eval's own evaluator and through ours."""
    scorer = Scorer(double, tokenizer)
    found = {s.metric: s for s in evaluate(scorer, [prepare(scorer, load(name, documents))]) if s.metric != "nll"}
    tasks = {"tasks": {name: load(name, documents)}, "groups": {}}
    theirs = lm_eval_evaluate(reference(double, tokenizer), tasks, bootstrap_iters=0)
    expected = {k.split(",")[0]: v for k, v in theirs["results"][name].items() if k.endswith(",none")}
    values = {k: v for k, v in expected.items() if not k.endswith("_stderr")}
    assert {metric: s.value for metric, s in found.items()} == pytest.approx(values, rel=1e-6)
    assert {s.task_version for s in found.values()} == {str(theirs["versions"][name])}
    assert {s.few_shot for s in found.values()} == {theirs["n-shot"][name]}
    samples = theirs["samples"][name]
    joined = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    assert {s.task_hash for s in found.values()} == {hash_string(joined)}


@pytest.mark.parametrize("name, documents", [("piqa", PIQA), ("arc_easy", ARC)])
def test_nll_is_of_the_right_choices_alone(double, tokenizer, name, documents):
    """As lm-eval's log-likelihoods of them, one by one, say; tokens are those of the right ones."""
    scorer, task = Scorer(double, tokenizer), load(name, documents)
    (found,) = [s for s in evaluate(scorer, [prepare(scorer, task)]) if s.metric == "nll"]
    right = [
        (task.doc_to_text(doc), " " + task.doc_to_choice(doc)[int(task.doc_to_target(doc))]) for doc in task.eval_docs
    ]
    logp = [p for p, _ in reference(double, tokenizer).loglikelihood(loglikelihoods(right), disable_tqdm=True)]
    tokens = [len(tokenizer(answer)["input_ids"]) for _, answer in right]
    assert found.value == pytest.approx(-sum(logp) / sum(tokens), rel=1e-6)
    assert (found.tokens, found.items) == (sum(tokens), len(right))


def test_error_of_nll_is_that_of_repeated_samples():
    """The spread over 4000 samples of 200 items; its own error is 1.1 %, tested at four times that."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 9, (4000, 200), generator=generator)
    logp = -tokens * (2 + torch.randn(tokens.shape, generator=generator).exp())
    samples = [nll(list(zip(p.tolist(), n.tolist(), strict=True))) for p, n in zip(logp, tokens, strict=True)]
    values, errors = torch.tensor(samples, dtype=torch.float64).T
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.05)
    assert nll([(-6.0, 3)]) == (2.0, None)


def test_word_perplexity_of_leads_is_lm_evals(double, tokenizer):
    scorer = Scorer(double, tokenizer, 64, WINDOW)
    found = {s.metric: s.value for s in evaluate(scorer, [prepare(scorer, load("wikipedia_leads", LEADS))])}
    lm = HFLM(pretrained=double, tokenizer=tokenizer, batch_size=2, max_length=WINDOW)
    tasks = {"tasks": {"wikipedia_leads": load("wikipedia_leads", LEADS)}, "groups": {}}
    theirs = lm_eval_evaluate(lm, tasks, bootstrap_iters=0)["results"]["wikipedia_leads"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-6)


def test_parity_holds_on_a_programmed_and_rerouted_model(single, tokenizer, ids):
    """And the scorer, made before, keeps nothing of an earlier state of the model."""
    plan = ReplacementPlan.fit(profile(single, ids, 64).magnitude, 2)
    scorer, lm = Scorer(single, tokenizer), reference(single, tokenizer)
    requests = loglikelihoods(PAIRS)
    clean = scorer.loglikelihood(requests, disable_tqdm=True)
    with program(single, NoiseModel(0.2), 0), apply(single, plan, RouterCalibration("iqr", 0.2)):
        noisy = scorer.loglikelihood(requests, disable_tqdm=True)
        close(noisy, lm.loglikelihood(requests, disable_tqdm=True), 1e-5)  # float32
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(clean, noisy, strict=True))
    assert scorer.loglikelihood(requests, disable_tqdm=True) == clean


def test_contexts_are_not_shared_on_arrays_whose_errors_follow_the_position(single, tokenizer, ids):
    placement = Placement("linear+kv")
    adc = Adc(bits=6)
    noise = NoiseModel(0.1, adc=Converter(adc, calibrate_ranges(single, ids, adc, placement, 64)))
    scorer, lm = Scorer(single, tokenizer), reference(single, tokenizer)
    requests = loglikelihoods(PAIRS[:4])
    with program(single, noise, 0, placement):
        close(scorer.loglikelihood(requests, disable_tqdm=True), lm.loglikelihood(requests, disable_tqdm=True), 1e-5)


def test_lm_head_sees_scored_positions_alone(single, tokenizer):
    scorer = Scorer(single, tokenizer, 256, WINDOW)
    prepared = [prepare(scorer, load("piqa", PIQA)), prepare(scorer, load("wikipedia_leads", LEADS))]
    seen = []
    single.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.numel() // output.shape[-1]))
    evaluate(scorer, prepared)
    assert sum(seen) == sum(p.tokens for p in prepared) == sum(s.tokens for s in {p.hash: p for p in prepared}.values())


def test_rows_hold_a_context_once_and_batches_their_bound(single, tokenizer):
    scorer = Scorer(single, tokenizer, 96)
    prepared = prepare(scorer, load("arc_easy", ARC))
    requests = [part for document in prepared.requests for instance in document for part in instance]
    rows = scorer._rows(requests)
    assert len(rows) == len(ARC)
    for row, choices in zip(rows, prepared.requests, strict=True):
        context = choices[0][0][1]
        assert len(row.tokens) == len(context) + sum(len(choice[0][2]) - 1 for choice in choices)
    batches = list(scorer._batches(rows * 3))
    lengths = [len(row.tokens) for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True) and len(batches) > 1
    assert all(len(b) == 1 or len(b) * len(b[0].tokens) <= 96 for b in batches)


def test_nothing_is_tokenised_or_drawn_while_scoring(single, tokenizer, monkeypatch):
    scorer = Scorer(single, tokenizer)
    prepared = [prepare(scorer, load("piqa", PIQA))]
    monkeypatch.setattr(scorer, "tok_encode", None)
    before = torch.get_rng_state()
    first = evaluate(scorer, prepared)
    assert torch.equal(before, torch.get_rng_state())
    assert evaluate(scorer, prepared) == first


def test_first_items_are_counted(single, tokenizer):
    scorer = Scorer(single, tokenizer)
    few, alone = prepare(scorer, load("piqa", PIQA), 2), prepare(scorer, load("piqa", PIQA[:2]))
    (one, *_), (other, *_) = evaluate(scorer, [few]), evaluate(scorer, [alone])
    assert (one.items, one.items_total, other.items_total) == (2, 3, 2)
    assert dataclasses.replace(one, items_total=2) == other


def test_perplexity_beyond_float64_is_named(single, tokenizer):
    scorer = Scorer(single, tokenizer)
    prepared = prepare(scorer, load("lambada_openai", LAMBADA))
    single.lm_head.weight.mul_(1e4)
    with pytest.raises(FloatingPointError, match="task lambada_openai: perplexity is inf"):
        evaluate(scorer, [prepared])


@pytest.mark.parametrize("items", [0, -1, 1.5, True])
def test_items_must_be_a_positive_number(single, tokenizer, items):
    with pytest.raises(InputError, match="items"):
        prepare(Scorer(single, tokenizer), load("piqa", PIQA), items)


def test_document_that_is_too_long_is_named(single, tokenizer):
    """lm-eval would cut off its beginning; the longest that fits is accepted."""
    scorer = Scorer(single, tokenizer)
    for extra, fits in ((0, True), (1, False)):
        text = "a " * 60 + "b" * (8 + extra) + " e"  # 128 + 1 tokens are 128 inputs and one that is predicted only
        text = text[-(129 + extra) :]
        if fits:
            assert prepare(scorer, load("lambada_openai", [{"text": text}])).tokens == 2
        else:
            with pytest.raises(InputError, match="task lambada_openai, item 0: .* 129 tokens.*128"):
                prepare(scorer, load("lambada_openai", [{"text": text}]))
    with pytest.raises(InputError, match="window: found 129"):
        Scorer(single, tokenizer, window=129)


def test_infinite_loglikelihood_names_task_and_item(single, tokenizer):
    scorer = Scorer(single, tokenizer)
    prepared = prepare(scorer, load("piqa", PIQA))
    single.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="task piqa, item 0"):
        evaluate(scorer, [prepared])


def test_standard_errors(monkeypatch):
    """A mean's is lm-eval's; a perplexity's is what its bootstrap estimates (1000 draws: 2.2 % at one sigma)."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    items = torch.randn(400, generator=torch.Generator().manual_seed(0)).sub(2).tolist()
    assert standard_error(mean, items) == pytest.approx(torch.tensor(items).double().std().item() / 20)
    assert standard_error(perplexity, items) == pytest.approx(bootstrap_stderr(perplexity, items, 1000), rel=0.1)
    assert standard_error(perplexity, items[:1]) is None and standard_error(max, items) is None
