"""Benchmarks of lm-evaluation-harness on a model whose noise changes between calls.

    scorer = Scorer(model, tokenizer, batch_tokens=1024, window=512)
    prepared = [prepare(scorer, benchmarks.load(name), items=64) for name in ("piqa", "arc_easy")]
    with program(model, noise, realisation=0):
        scores = evaluate(scorer, prepared)          # again and again: nothing is kept but the tokens

Tasks, metrics and the rules of tokenisation are lm-eval's. What is ours is how requests become forward passes: sorted
by length, the choices of one item behind a single copy of its context, and lm_head applied only where a token is
scored; and one more metric of tasks with choices, `nll`: nats a token of the right ones, which tells states of a model
apart with fewer items than an accuracy does. Nothing is drawn here, and lm-eval's response cache, which does not see
noise, is never used.
"""

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr, perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, hash_string, make_disjoint_window

from romer.errors import InputError

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's: texts (None: rolling), context, continuation


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: a context and the continuations that branch off it, without their last tokens.

    tokens, positions, branch [T]: branch 0 is the context, which all see; j the j-th continuation, which only itself
    sees. scored: (number of the request, places [n] whose logits predict it, its tokens [n]) of each continuation.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    scored: list[tuple[int, list[int], list[int]]]


def row(context: list[int], continuations: Sequence[tuple[int, list[int]]]) -> Row:
    """The row of a context and its (number, continuation)s."""
    tokens, positions, branch, scored = list(context), list(range(len(context))), [0] * len(context), []
    for j, (number, continuation) in enumerate(continuations, 1):
        start, inner = len(tokens), continuation[:-1]
        tokens += inner
        positions += range(len(context), len(context) + len(inner))
        branch += [j] * len(inner)
        scored.append((number, [len(context) - 1, *range(start, start + len(inner))], continuation))
    return Row(tokens, positions, branch, scored)


class Scorer(HFLM):
    """lm-eval's model object around a model in memory. The model may be programmed and rewritten between calls.

    batch_tokens: tokens of a forward pass, padding included; window: longest context of rolling log-likelihoods, the
    model's own by default. Log-probabilities are float32 (float64 for such a model), also where the model is bfloat16.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, batch_tokens: int = 1024, window: int | None = None):
        with _quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.batch_tokens, self.window = batch_tokens, window or self.max_length
        if self.window > self.max_length:
            raise InputError(f"window: found {self.window}, the model's longest context is {self.max_length} tokens")

    def encode(self, instance: Instance) -> list[Request]:
        """The tokens of one of lm-eval's instances: one request, or one for every window of a rolling one.

        Raises InputError for a type that is not scored by log-likelihood and for an empty context or continuation.
        """
        if instance.request_type == "loglikelihood_rolling":
            (text,) = instance.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.window, 1)
            return [(None, *make_disjoint_window(window)) for window in windows]
        if instance.request_type != "loglikelihood":
            raise InputError(f"found a request of type {instance.request_type}, expected log-likelihoods")
        context, continuation = instance.args
        if not context or not continuation:
            raise InputError(f"request {instance.args!r}: empty context or continuation")
        return [((context, continuation), *self._encode_pair(context, continuation))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in disjoint windows, the first token predicted from the prefix token; as HFLM's."""
        parts = [self.encode(instance) for instance in requests]
        scores = iter(self._loglikelihood_tokens([window for windows in parts for window in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in parts]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives) of every request, in order."""
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        for batch in self._batches(self._rows(requests)):
            rows, columns, targets = [], [], []
            for i, one in enumerate(batch):
                for _, places, tokens in one.scored:
                    rows += [i] * len(places)
                    columns += places
                    targets += tokens
            logits = self._logits(batch, torch.tensor(rows), torch.tensor(columns))  # [n, V]
            target = torch.tensor(targets, device=logits.device)
            logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            greedy = logits.argmax(-1) == target
            lengths = [len(tokens) for one in batch for _, _, tokens in one.scored]
            numbers = [number for one in batch for number, _, _ in one.scored]
            for number, p, same in zip(numbers, logp.split(lengths), greedy.split(lengths), strict=True):
                answers[number] = (float(p.sum()), bool(same.all()))
        return answers

    def _rows(self, requests: list[Request]) -> list[Row]:
        """Neighbours with one context share it, as far as `batch_tokens` reach.

        Not on arrays with converters or a KV cache: there, a token's errors follow from its place in the row. Raises
        InputError for a request that is longer than the model's context.
        """
        shared = not any(hasattr(module, "site") for module in self.model.modules())
        groups: list[tuple[list[int], list[tuple[int, list[int]]]]] = []
        before, size = None, 0  # the context that the next request may share, and how long its row is by now
        for number, (name, context, continuation) in enumerate(requests):
            self.check(name, context, continuation)
            inner = len(continuation) - 1
            if before == context and size + inner <= self.batch_tokens:
                groups[-1][1].append((number, continuation))
                size += inner
            else:
                groups.append((context, [(number, continuation)]))
                size = len(context) + inner
            before = context if shared else None
        return [row(*group) for group in groups]

    def check(self, name: tuple[str, str] | None, context: list[int], continuation: list[int]) -> None:
        """Raises InputError for a request that does not fit the model's context; HFLM would cut its beginning off."""
        if (length := len(context) + len(continuation) - 1) > self.max_length:
            what = repr(name[0][:60]) if name else "a window"
            raise InputError(f"request {what}: {length} tokens, the model's longest context is {self.max_length}")

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Longest rows first, as many as fit into `batch_tokens` when padded to the longest; one at least."""
        batch: list[Row] = []
        for one in sorted(rows, key=lambda r: -len(r.tokens)):
            if batch and (len(batch) + 1) * len(batch[0].tokens) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _logits(self, batch: list[Row], rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] at the places (rows [n], columns [n]) of a batch, padded on the right."""
        longest = len(batch[0].tokens)

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([v + [fill] * (longest - len(v)) for v in values], device=self.device)

        more = {}
        if any(len(one.scored) > 1 for one in batch):
            branch = padded([one.branch for one in batch], 0)  # [B, T]
            visible = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
            visible &= torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
            mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
            more["attention_mask"] = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]  # [B, 1, T, T]
            more["position_ids"] = padded([one.positions for one in batch], 0)
        tokens = padded([one.tokens for one in batch], 0)
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, columns][None], *args[1:]))
        try:
            logits = self.model(input_ids=tokens, use_cache=False, **more).logits[0]
        finally:
            hook.remove()
        return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class Prepared:
    """A task's first documents with their requests, built and tokenised for one model.

    documents_total: how many the task has; requests: of every document, of every instance, the tokenised parts; hash:
    lm-eval's, of documents, prompts and targets; tokens: how many are scored.
    """

    task: ConfigurableTask
    documents: tuple[dict, ...]
    documents_total: int
    requests: tuple[tuple[tuple[Request, ...], ...], ...]
    hash: str
    tokens: int


@dataclass(frozen=True)
class Score:
    """One metric of one task: value, standard error over items (None where none is defined), and what a reader
    needs to compare it: items used and of how many, scored tokens, version, hash, shots, lm-eval's version."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    items_total: int
    tokens: int
    task_version: str
    task_hash: str
    few_shot: int
    lm_eval: str


def prepare(scorer: Scorer, task: ConfigurableTask, items: int | None = None) -> Prepared:
    """The first `items` documents of a task (all by default), their requests built and tokenised by the scorer.

    Raises InputError for a number of items that is not positive, a task that is not scored by log-likelihoods, and a
    document that does not fit the model's context.
    """
    if items is not None and (type(items) is not int or items < 1):
        raise InputError(f"items: found {items!r}, expected a positive number, or null for all")
    with _quiet():
        task.build_all_requests(limit=items)
    documents = tuple(doc for _, doc in task.doc_iterator(limit=items))
    requests: list[list[tuple[Request, ...]]] = [[] for _ in documents]
    hashes: list[str] = []
    for instance in sorted(task.instances, key=lambda i: (i.doc_id, i.idx)):
        try:
            parts = scorer.encode(instance)
            for part in parts:
                scorer.check(*part)
        except InputError as error:
            raise InputError(f"task {task.config.task}, item {instance.doc_id}: {error}") from None
        if not requests[instance.doc_id]:
            doc = documents[instance.doc_id]
            text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
            hashes += map(hash_string, (text, instance.args[0], str(task.doc_to_target(doc))))
        requests[instance.doc_id].append(tuple(parts))
    frozen = tuple(map(tuple, requests))
    tokens = sum(len(part[2]) for document in frozen for instance in document for part in instance)
    return Prepared(task, documents, len(task.eval_docs), frozen, hash_string("".join(hashes)), tokens)


def evaluate(scorer: Scorer, prepared: Sequence[Prepared]) -> list[Score]:
    """Every metric of every task, and `nll`, on the model as it is now. Leaves all random generators as it found them.

    Raises FloatingPointError, naming task and item, where a log-likelihood is not finite.
    """
    return [score for one in prepared for score in _scores(scorer, one)]


def _scores(scorer: Scorer, prepared: Prepared) -> Iterator[Score]:
    task, name, total = prepared.task, prepared.task.config.task, prepared.documents_total
    parts = [part for document in prepared.requests for instance in document for part in instance]
    answers = iter(scorer._loglikelihood_tokens(parts))
    values: dict[str, list] = {}
    right: list[tuple[float, int]] = []  # (log p, tokens) of the right choice of each item
    for number, (doc, instances) in enumerate(zip(prepared.documents, prepared.requests, strict=True)):
        found = [[next(answers) for _ in instance] for instance in instances]
        if not all(math.isfinite(p) for instance in found for p, _ in instance):
            raise FloatingPointError(f"task {name}, item {number}: a log-likelihood is not finite")
        rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
        results = [sum(p for p, _ in instance) if rolling else instance[0] for instance in found]
        for metric, value in task.process_results(doc, results).items():
            values.setdefault(metric, []).append(value)
        if task.OUTPUT_TYPE == "multiple_choice":
            gold = int(task.doc_to_target(doc))
            right.append((results[gold][0], len(instances[gold][0][2])))
    about = (str(task.VERSION), prepared.hash, task.config.num_fewshot, lm_eval.__version__)
    for metric, items in values.items():
        try:
            value = float(task.aggregation()[metric](items))
        except OverflowError:  # a perplexity beyond float64
            value = math.inf
        if not math.isfinite(value):
            raise FloatingPointError(f"task {name}: {metric} is {value}")
        error = standard_error(task.aggregation()[metric], items)
        yield Score(name, metric, value, error, len(prepared.documents), total, prepared.tokens, *about)
    if right:
        value, error = nll(right)
        yield Score(name, "nll", value, error, len(right), total, sum(n for _, n in right), *about)


def nll(right: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """(nats a token, standard error over items) of continuations with (log p, tokens): the ratio of two sums, its error
    to first order; None for one item."""
    logp, tokens = (torch.tensor(values, dtype=torch.float64) for values in zip(*right, strict=True))
    value = -logp.sum() / tokens.sum()
    if len(right) < 2:
        return float(value), None
    left = -logp - value * tokens  # of every item; their sum is 0
    return float(value), float(left.std() / (tokens.mean() * len(right) ** 0.5))


def standard_error(aggregation: Callable[[list], float], items: list) -> float | None:
    """Standard error over items: lm-eval's formula for a mean; of a perplexity exp(-m), to first order, exp(-m) times
    that of m, which is what lm-eval's bootstrap estimates with random numbers. None for others, or for one item."""
    if len(items) < 2 or aggregation not in (mean, perplexity):
        return None
    error = mean_stderr(items)
    return float(error * aggregation(items) if aggregation is perplexity else error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars and its warnings about a model or documents that are already in memory."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
