"""Scheduling order, case by case (see tests/laws/test_random_schedules.py for random schedules)."""

from easyllm.engine.pages import PagePool
from easyllm.engine.scheduler import Scheduler, Sequence


def sequence(number, length, **options):
    tokens = [100 * number + i for i in range(length)]
    return Sequence(id=number, tokens=tokens, prompt_length=length, **options)


def scheduler_of(num_pages, page_size=4, **options):
    return Scheduler(
        PagePool(num_pages, page_size),
        **{"max_step_tokens": 16} | options | {"max_running": options.get("max_running", 4)},
    )


def planned(scheduler):
    """Returns a step as (sequence, first token, number of tokens, rows)."""
    step = scheduler.plan()
    return [(p.sequence_id, p.start, len(p.token_ids), p.num_logit_rows) for p in step.pieces]


def advance(scheduler, *, sample_tokens=True):
    """Plans a step and marks it as computed; every row yields a token."""
    step = scheduler.plan()
    running = {s.id: s for s in scheduler.running}
    for piece in step.pieces:
        each = running[piece.sequence_id]
        computed = piece.start + len(piece.token_ids)
        scheduler.advance(each, computed)
        if sample_tokens and computed == len(each.tokens):
            each.tokens.append(7)
    return step


def test_prompts_are_scheduled_in_order_and_long_ones_are_chunked_alongside_decodes():
    scheduler = scheduler_of(64)
    for number, length in enumerate((6, 30, 3)):
        scheduler.add(sequence(number, length))
    assert planned(scheduler) == [(0, 0, 6, 1), (1, 0, 10, 0)]  # 16 tokens; the chunk has no row
    scheduler = scheduler_of(64)
    for number, length in enumerate((6, 30, 3)):
        scheduler.add(sequence(number, length))
    advance(scheduler)
    assert planned(scheduler) == [(0, 6, 1, 1), (1, 10, 15, 0)]
    for s in scheduler.running:
        scheduler.advance(s, {0: 7, 1: 25}[s.id])
    scheduler.running[0].tokens.append(7)
    assert planned(scheduler) == [(0, 7, 1, 1), (1, 25, 5, 1), (2, 0, 3, 1)]


def test_max_running_counts_completions_of_a_prompt_from_the_start():
    scheduler = scheduler_of(64, max_running=4)
    scheduler.add(sequence(0, 2, copies=3))
    scheduler.add(sequence(1, 2, copies=2))
    scheduler.add(sequence(2, 2))
    advance(scheduler, sample_tokens=False)
    # three completions; two more requests are too many, and none overtakes them
    assert [s.id for s in scheduler.running] == [0]
    parent = scheduler.running[0]
    children = scheduler.fork(parent, [10, 11])
    assert [s.id for s in scheduler.running] == [0, 10, 11]
    for each in (parent, *children):
        each.tokens.append(7)
    scheduler.remove(children[0])
    assert [number for number, *_ in planned(scheduler)] == [0, 11, 1]


def test_the_youngest_sequence_is_preempted_to_the_head_and_keeps_its_tokens():
    scheduler = scheduler_of(5)
    for number in range(3):
        scheduler.add(sequence(number, 7))
    advance(scheduler)
    assert [s.id for s in scheduler.running] == [0, 1]  # two pages each, with one free slot
    advance(scheduler)  # the eighth tokens
    step = scheduler.plan()  # the ninth tokens: a page for 0, none for 1
    assert [p.sequence_id for p in step.pieces] == [0]
    assert scheduler.num_preemptions == 1
    assert [s.id for s in scheduler.waiting] == [1, 2]
    preempted = scheduler.waiting[0]
    assert preempted.computed == 0
    assert preempted.tokens[-2:] == [7, 7]
    scheduler.check()


def test_draft_tokens_are_dropped_if_they_would_take_a_page_from_others():
    scheduler = scheduler_of(4)
    for number in range(2):
        scheduler.add(sequence(number, 7))
    advance(scheduler)
    for s in scheduler.running:
        s.drafts = (1, 2, 3)
    assert planned(scheduler) == [(0, 7, 1, 1), (1, 7, 1, 1)]
    assert scheduler.num_preemptions == 0


def test_draft_tokens_yield_the_budget_to_decodes():
    scheduler = scheduler_of(64, max_step_tokens=5, max_running=3)
    for number in range(3):
        scheduler.add(sequence(number, 1))
    advance(scheduler)
    for s in scheduler.running:
        s.drafts = (1, 2, 3)
    assert planned(scheduler) == [(0, 1, 3, 3), (1, 1, 1, 1), (2, 1, 1, 1)]


def test_an_unchunked_prompt_exceeds_the_budget_alone_but_waits_for_others():
    scheduler = scheduler_of(64, unchunked_prefill=True, prefix=True)
    for number, length in enumerate((10, 40, 5)):
        scheduler.add(sequence(number, length))
    step = advance(scheduler)
    assert [(p.sequence_id, len(p.token_ids), p.prefix) for p in step.pieces] == [(0, 10, 10)]
    step = advance(scheduler)
    assert [(p.sequence_id, len(p.token_ids), p.prefix) for p in step.pieces] == [
        (0, 1, 10),
        (1, 40, 40),
    ]


def test_a_removed_sequence_frees_its_pages_whether_it_runs_or_waits():
    scheduler = scheduler_of(6, max_running=1)
    first, second = sequence(0, 20), sequence(1, 3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.plan()
    assert scheduler.pool.available < 6
    scheduler.remove(first)
    scheduler.remove(second)
    assert scheduler.pool.available == 6
    assert not scheduler.busy
    assert scheduler.plan() is None
