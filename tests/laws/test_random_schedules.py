"""Random schedules: no page leaks or is shared wrongly, and every output is as if served alone.

The scheduler runs on a cache of token ids whose next token is a hash of the pages it reads
(tests/support/hash_runner.py), and the complete engine on a tiny real model.
"""

import random

import pytest

from easyllm.engine import Engine, EngineConfig, Request, SamplingParams
from easyllm.engine.pages import Namespace, PageKey, PagePool
from easyllm.engine.scheduler import Scheduler, Sequence
from easyllm.engine.speculative import NgramDrafter
from hash_runner import VOCAB, HashRunner, next_token, tokens_alone
from tiny_models import build_tiny

SCHEDULES = 20_000
PARTS = 4
BEGINNINGS = [[random.Random(i).randrange(2) for _ in range(12)] for i in range(3)]


class Client:
    """A request of the schedule, and its tokens so far by completion."""

    def __init__(self, rng, number, longest):
        # few tokens and few prefixes, so that prefixes are shared and equal pages follow different
        # ones
        base = rng.choice(BEGINNINGS)[: rng.randrange(1, longest)]
        self.prompt = base + [rng.randrange(3) for _ in range(rng.randrange(3))]
        self.count = rng.randrange(1, 13)
        self.copies = rng.choice((1, 1, 1, 2, 3))
        self.sequence = Sequence(
            id=number,
            tokens=list(self.prompt),
            prompt_length=len(self.prompt),
            namespace=Namespace(
                adapter=rng.choice(("", "", "", "a")), salt=rng.choice(("", "", "", "s"))
            ),
            copies=self.copies,
        )
        self.open = {}  # sequence id: (completion's index, sequence)
        self.got = {}


class CountingPool(PagePool):
    """Counts the pages that prefix caching found."""

    hits = 0

    def find(self, key):
        page = super().find(key)
        self.hits += page is not None
        return page


def run_schedule(seed):
    """Runs one schedule to completion; returns its numbers of preemptions and prefix hits."""
    rng = random.Random(seed)
    size, window = rng.randrange(1, 5), rng.choice((None, None, None, 1, 3, 6))
    longest, budget = rng.choice((4, 12)), rng.choice((4, 7, 64))
    least = -(-(longest + 12) // size)  # needed by the longest sequence alone
    if window is not None:
        least = min(least, -(-(window - 1 + budget) // size) + 1)
    pages = least + rng.choice((0, 0, 1, 2, 5))
    pool = CountingPool(pages, size, prefix_caching=rng.random() < 0.8)
    scheduler = Scheduler(
        pool, max_running=rng.choice((3, 4)), max_step_tokens=budget, window=window
    )
    runner = HashRunner(pages, size, window)
    clients = [Client(rng, i, longest) for i in range(rng.randrange(1, 10))]
    unborn, owners, numbers = list(clients), {}, len(clients)
    drafting = rng.random() < 0.3
    for turn in range(10_000):
        while unborn and rng.random() < 0.5:
            client = unborn.pop()
            client.open[client.sequence.id] = (0, client.sequence)
            owners[client.sequence.id] = client
            scheduler.add(client.sequence)
        if rng.random() < 0.03 and (victims := [c for c in clients if c.open]):
            victim = rng.choice(victims)
            for _, sequence in victim.open.values():
                scheduler.remove(sequence)
            victim.open, victim.got = {}, None
        for sequence in scheduler.running if drafting else ():
            client = owners[sequence.id]
            index = client.open[sequence.id][0]
            left = client.count - len(sequence.tokens) + sequence.prompt_length - 1
            if sequence.pending == 1 and len(sequence.tokens) > sequence.prompt_length:
                right = tokens_alone(sequence.tokens, 3, window=window, index=index)
                wrong = [t if rng.random() < 0.7 else (t + 1) % VOCAB for t in right]
                sequence.drafts = tuple(wrong[: max(0, min(left, rng.randrange(4)))])
        step = scheduler.plan()
        if step is None:
            if not unborn:
                break
            continue
        assert sum(len(p.token_ids) for p in step.pieces) <= budget
        if rng.random() < 0.02:  # the pass fails, or the weights change
            scheduler.preempt_all()
            if rng.random() < 0.5:
                pool.clear_prefix_cache()
            continue
        rows = iter(runner.read(step))
        for piece in step.pieces:
            numbers = take(
                scheduler, owners, piece, [next(rows) for _ in range(piece.num_logit_rows)], numbers
            )
        if turn % 4 == 0:
            scheduler.check()
    scheduler.check()
    assert not scheduler.busy
    assert pool.available == pool.num_pages
    for client in clients:
        for index in range(client.copies if client.got is not None else 0):
            alone = tokens_alone(client.prompt, client.count, window=window, index=index)
            assert client.got[index] == alone, f"schedule {seed}: {client.prompt}"
    return scheduler.num_preemptions, pool.hits


def take(scheduler, owners, piece, rows, numbers):
    """Handles a piece's rows like an engine: samples, verifies drafts, forks, finishes."""
    client = owners[piece.sequence_id]
    index, sequence = client.open[piece.sequence_id]
    drafts = sequence.drafts
    computed = piece.start + len(piece.token_ids) - len(drafts)
    if computed < len(sequence.tokens):
        scheduler.advance(sequence, computed)
        return numbers
    family = [(index, sequence)]
    if sequence.copies > 1:
        scheduler.advance(sequence, computed)
        ids = range(numbers, numbers + sequence.copies - 1)
        numbers += len(ids)
        family += enumerate(scheduler.fork(sequence, ids), start=1)
        for place, child in family[1:]:
            client.open[child.id] = (place, child)
            owners[child.id] = client
    for place, each in family:
        for row, draft in zip(rows, (*drafts, None), strict=True):
            token = next_token(row, place)
            each.tokens.append(token)
            if token != draft:
                break
        scheduler.advance(each, len(each.tokens) - 1)
        output = each.tokens[each.prompt_length :]
        if len(output) >= client.count:
            client.got[place] = output
            del client.open[each.id]
            scheduler.remove(each)
    return numbers


@pytest.mark.parametrize("part", range(PARTS))
def test_20000_random_schedules_leak_nothing_and_give_each_request_its_output_alone(part):
    """In tiny pools: arrivals, cancellations, preemption, shared prefixes, forks, windows.

    Also rejected draft tokens and failing passes.
    """
    share = SCHEDULES // PARTS
    counts = [run_schedule(seed) for seed in range(part * share, (part + 1) * share)]
    preempted, hit = (sum(count > 0 for count in column) for column in zip(*counts, strict=True))
    assert preempted > share // 10  # the schedules exercise preemption
    assert hit > share // 10


def run_schedules(count):
    for seed in range(count):
        run_schedule(seed)


def test_a_page_that_is_not_copied_is_detected(monkeypatch):
    """Negative control: forks that write into each other's last page."""
    monkeypatch.setattr("easyllm.engine.page_table.PageTable._shared", lambda self, start: [])
    with pytest.raises(AssertionError):
        run_schedules(300)


def test_a_prefix_found_by_a_wrong_key_is_detected(monkeypatch):
    """Negative control: pages found by their tokens only, regardless of the preceding tokens."""

    def key(self, tokens, start):
        piece = tuple(tokens[start : start + self.pool.page_size])
        return PageKey(b"", piece, self.namespace)

    monkeypatch.setattr("easyllm.engine.page_table.PageTable._key", key)
    with pytest.raises(AssertionError, match="schedule"):
        run_schedules(300)


# ---- the complete engine on a tiny real model


@pytest.fixture(scope="module")
def model():
    return build_tiny(seed=3, max_position_embeddings=64).double()


def random_requests(rng):
    """Returns greedy and seeded requests with common prefixes."""
    base = [rng.randrange(3, 320) for _ in range(24)]
    requests = []
    for _ in range(rng.randrange(2, 7)):
        prompt = base[: rng.randrange(1, 24)] + [
            rng.randrange(3, 320) for _ in range(rng.randrange(4))
        ]
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randrange(5),
            max_tokens=rng.randrange(1, 9),
            n=rng.choice((1, 1, 1, 2)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
            ignore_eos=True,
        )
        requests.append(
            Request(prompt_ids=tuple(prompt), params=params, salt=rng.choice(("", "s")))
        )
    return requests


def tokens_of(events):
    found = {}
    for event in events:
        found.setdefault((event.request_id, event.index), []).append(event.token_id)
    return found


def test_200_random_schedules_on_a_model_give_each_request_its_output_alone(model, tiny_tokenizer):
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    wide = Engine(model, tiny_tokenizer, EngineConfig(num_pages=64, prefix_caching=False))
    preempted = 0
    for seed in range(200):
        rng = random.Random(seed)
        size = rng.choice((2, 4, 8))
        options = EngineConfig(
            page_size=size,
            num_pages=-(-36 // size) + rng.randrange(4),
            max_running=rng.choice((2, 4)),
            max_step_tokens=rng.choice((5, 16, 64)),
            prefix_caching=rng.random() < 0.8,
        )
        drafter = NgramDrafter(3) if rng.random() < 0.3 else None
        engine = Engine(model, tiny_tokenizer, options, drafter=drafter)
        unborn, added, events = random_requests(rng), [], []
        cancelled = set()
        while unborn or engine.busy:
            while unborn and rng.random() < 0.5:
                added.append(unborn.pop())
                engine.add(added[-1])
            if added and rng.random() < 0.03:
                cancelled.add(added[0].id)
                engine.cancel(added[0].id)
            events += engine.step()
            engine.scheduler.check()
        assert engine.pool.available == engine.pool.num_pages
        preempted += engine.scheduler.num_preemptions
        got = tokens_of(e for e in events if e.request_id not in cancelled)
        for request in added:
            if request.id not in cancelled:
                alone = tokens_of(wide.run([request]))
                assert {key: got[key] for key in alone} == alone, f"schedule {seed}"
    assert preempted > 20


def test_the_hash_runner_serves_a_complete_engine(model, tiny_tokenizer):
    """The engine's text, sampling and events do not mix up completions either."""
    options = EngineConfig(page_size=2, num_pages=20, max_running=4, max_step_tokens=9)
    engine = Engine(model, tiny_tokenizer, options, runner=HashRunner(20, 2))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(range(3, 4 + i % 9)), params=params) for i in range(24)]
    got = tokens_of(engine.run(requests))
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        assert got[request.id, 0] == tokens_alone(request.prompt_ids, 12)
