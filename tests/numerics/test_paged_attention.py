"""Paged attention against explicit attention in fp64; unused memory contains NaN."""

import pytest
import torch

from easyllm.nn.position import AlibiPosition
from easyllm.ops.attention import explicit_attention
from easyllm.ops.attention_rule import AttentionRule, ScoreTerms
from easyllm.ops.paged_attention import (
    QuantizedPages,
    dequantize_heads,
    gather_pages,
    new_pages,
    paged_attention,
    quantize_heads,
    reference_paged_attention,
    write_pages,
)

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
NOT_A_PAGE = 2**31 - 1


class Case:
    """Random queries, keys and values of some sequences, written to pages in random order."""

    def __init__(
        self, heads, kv_heads, dim, lengths, key_lengths, page_size=16, dtype=torch.float32, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        self.lengths, self.key_lengths = tuple(lengths), tuple(key_lengths)
        self.q = random(sum(lengths), heads, dim)
        self.keys = [random(n, kv_heads, dim) for n in key_lengths]
        self.values = [random(n, kv_heads, dim) for n in key_lengths]
        self.page_size, self.shape = page_size, (kv_heads, page_size, dim)
        self.write(dtype, generator)

    def write(self, dtype, generator):
        """Writes shuffled pages of `dtype`, including a few unowned ones."""
        counts = [-(-n // self.page_size) for n in self.key_lengths]
        total = sum(counts) + 3
        order = torch.randperm(total, generator=generator)[: sum(counts)].split(counts)
        self.table = torch.full((len(counts), max(counts) + 2), NOT_A_PAGE, dtype=torch.int32)
        self.pages = [new_pages((total, *self.shape), dtype) for _ in range(2)]
        for pages in self.pages:
            poison(pages)
        for n, own in enumerate(order):
            self.table[n, : len(own)] = own
            token = torch.arange(self.key_lengths[n])
            at = own[token // self.page_size], token % self.page_size
            for pages, x in zip(self.pages, (self.keys[n], self.values[n]), strict=True):
                write_pages(pages, x, *at)
        return self

    def stored(self, which):
        """Returns the contents of the pages, one tensor per sequence."""
        return [
            gather_pages(self.pages[which], self.table[n], torch.arange(length))
            for n, length in enumerate(self.key_lengths)
        ]

    def run(self, rule, prefixes=None, dtype=None):
        q = self.q if dtype is None else self.q.to(dtype)
        return paged_attention(
            q, *self.pages, self.table, self.lengths, self.key_lengths, rule, prefixes
        )

    def exact(self, rule, prefixes=None):
        out = []
        for n, query in enumerate(self.q.split(self.lengths)):
            if not len(query):
                continue
            k, v = (self.stored(which)[n].double() for which in (0, 1))
            position = torch.arange(len(k))
            prefix = prefixes[n] if prefixes else 0
            asking = position[len(k) - len(query) :]
            out.append(
                explicit_attention(query.double(), k, v, rule, asking, position, prefix=prefix)
            )
        return torch.cat(out)


def poison(pages):
    """Fills pages with values that would be visible in any result that reads them."""
    if isinstance(pages, QuantizedPages):
        pages.codes.fill_(77)
        pages.scales.fill_(float("nan"))
    else:
        pages.fill_(float("nan"))


def close(out, exact, tolerance):
    assert not out.isnan().any()
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


SHAPES = {
    "decode, gqa": (9, 3, 64, (1, 1, 1, 1), (1, 17, 64, 333)),
    "prefill and decode mixed": (4, 2, 32, (40, 1, 0, 7), (40, 129, 5, 71)),
    "one long context": (8, 1, 128, (1,), (1000,)),
    "mha, odd widths": (3, 3, 24, (5, 66), (70, 66)),
    "many heads to one": (40, 1, 8, (3, 2), (9, 65)),
    "width of no kernel": (2, 2, 10, (31, 8), (31, 9)),
}
RULES = {
    "causal": AttentionRule(scale=0.2),
    "window 5": AttentionRule(scale=0.2, window=5),
    "window over splits": AttentionRule(scale=0.2, window=100),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("page_size", [8, 16, 40, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_paged_attention_equals_explicit_attention(kernels_or_plain, shape, page_size, rule):
    case = Case(*shape, page_size=page_size)
    close(case.run(rule), case.exact(rule), TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("page_size", [8, 40, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_alibi_equals_explicit_attention(kernels_or_plain, shape, page_size, window):
    terms = AlibiPosition(shape[0]).terms
    rule = AttentionRule(scale=0.2, window=window, terms=terms)
    case = Case(*shape, page_size=page_size)
    close(case.run(rule), case.exact(rule), TOLERANCE[torch.float32])
    other = AttentionRule(scale=0.2, window=window)
    assert not torch.allclose(case.run(rule), case.run(other), atol=1e-3)


@pytest.mark.parametrize("pages", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16])
def test_queries_and_pages_may_have_different_dtypes(kernels_or_plain, queries, pages):
    case = Case(*SHAPES["prefill and decode mixed"], dtype=pages)
    out = case.run(RULES["causal"], dtype=queries)
    assert out.dtype == queries
    close(out, case.exact(RULES["causal"]), TOLERANCE[queries])


def test_pages_before_the_window_are_not_read(kernels_or_plain):
    rule = RULES["window 5"]
    case = Case(2, 1, 16, (1, 3), (90, 70))
    exact = case.exact(rule)
    for n, length in enumerate(case.key_lengths):
        first = length - case.lengths[n] - rule.window + 1
        for page in case.table[n, : first // case.page_size].long():
            for pages in case.pages:
                pages[page] = float("nan")
        case.table[n, : first // case.page_size] = NOT_A_PAGE
    close(case.run(rule), exact, TOLERANCE[torch.float32])


OTHER_RULES = {
    "sinks": AttentionRule(scale=0.2, window=9, num_sinks=3),
    "soft cap": AttentionRule(scale=0.2, softcap=2.0),
    "bidirectional": AttentionRule(scale=0.2, causal=False),
    "bias": AttentionRule(
        scale=0.2, terms=ScoreTerms(bias=lambda q, k: -0.1 * (q[:, None] - k[None]).abs()[None])
    ),
}


@pytest.mark.parametrize("rule", OTHER_RULES.values(), ids=OTHER_RULES.keys())
def test_rules_that_the_kernel_does_not_support_are_computed_by_pytorch(kernels_or_plain, rule):
    case = Case(4, 2, 16, (6, 1), (6, 50))
    close(case.run(rule), case.exact(rule), TOLERANCE[torch.float32])


def test_prefix_tokens_see_each_other(kernels_or_plain):
    case = Case(4, 2, 16, (30, 20), (30, 20))
    rule = RULES["causal"]
    close(case.run(rule, (11, 20)), case.exact(rule, (11, 20)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8", "int4"])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 1, 40)])
def test_rows_are_bitwise_batch_invariant(kernels, shape, dtype, rule):
    """Compares rows of a full pass, of chunks, and alone, with other pages and work partitions."""
    length = 300
    whole = Case(*shape, (length,), (length,), dtype=dtype)
    full = whole.run(rule)
    company = Case(*shape, (50, 1, 1, 90), (50, 400, length, 90), dtype=dtype, seed=1)
    company.keys[2], company.values[2] = whole.keys[0], whole.values[0]
    company.write(dtype, torch.Generator().manual_seed(2))
    company.q[51] = whole.q[-1]
    assert torch.equal(company.run(rule)[51], full[-1])
    for first, last in [(0, 1), (7, 8), (63, 64), (64, 65), (130, 171), (200, 300)]:
        part = paged_attention(
            whole.q[first:last], *whole.pages, whole.table, (last - first,), (last,), rule
        )
        assert torch.equal(part, full[first:last])


def test_results_are_bitwise_independent_of_the_number_of_threads(kernels):
    case = Case(9, 3, 64, (3, 1), (200, 501))
    two = case.run(RULES["causal"])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(case.run(RULES["causal"]), two)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_codes_are_within_half_a_quantization_step(bits, scale):
    x = torch.randn(50, 3, 40) * scale
    x[0], x[1], x[2, :, 1:] = 0.0, scale, 0.0
    codes, scales = quantize_heads(x, bits)
    error = (dequantize_heads(codes, scales) - x).abs()
    assert (error <= scales[..., :1] * 0.5001 + 1e-6 * x.abs().amax(-1, keepdim=True)).all()
    bound = (
        x.abs().amax(-1) / 127 if bits == 8 else (x.amax(-1) - x.amin(-1)) / 15
    )  # the quantization step by definition
    torch.testing.assert_close(scales[..., 0], bound.clamp(min=1e-30))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_quantized_pages_equal_attention_over_dequantized_values(kernels_or_plain, shape, dtype):
    case = Case(*shape, dtype=dtype)
    close(case.run(RULES["causal"]), case.exact(RULES["causal"]), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.02), ("int4", 0.3)])
def test_quantized_pages_stay_close_to_the_keys(kernels_or_plain, dtype, most):
    """With random normal keys: the relative root mean square error of the output."""
    plain, small = (Case(9, 3, 64, (100,), (100,), dtype=d) for d in (torch.float32, dtype))
    exact = plain.exact(RULES["causal"])
    error = small.run(RULES["causal"]).double() - exact
    assert error.square().mean().sqrt() <= most * exact.square().mean().sqrt()


def test_kernel_and_reference_agree_on_a_batch(kernels):
    case = Case(9, 3, 64, (1,) * 20, tuple(range(1, 600, 30)))
    arguments = (case.q, *case.pages, case.table, case.lengths, case.key_lengths, RULES["causal"])
    torch.testing.assert_close(
        paged_attention(*arguments), reference_paged_attention(*arguments), atol=5e-6, rtol=1e-5
    )


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="int3"):
        new_pages((1, 1, 8, 8), "int3")
    with pytest.raises(ValueError, match="even head_dim"):
        new_pages((1, 1, 8, 7), "int4")


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchunked_prompts_may_attend_over_their_new_keys(kernels_or_plain, dtype, window):
    lengths = (80, 1, 100, 3, 64)
    case = Case(6, 2, 32, lengths, (80, 70, 100, 3, 200), dtype=dtype)
    rule = AttentionRule(scale=0.2, window=window)
    new = [
        torch.cat([x[-n:] for x, n in zip(xs, lengths, strict=True)]).to(dtype)
        for xs in (case.keys, case.values)
    ]
    q = case.q.to(dtype)
    out = paged_attention(
        q, *case.pages, case.table, lengths, case.key_lengths, rule, new=(new[0], new[1])
    )
    case.q = q
    exact = case.exact(rule)
    assert (out.double() - exact).norm() < TOLERANCE[dtype] * exact.norm()
    for pages in case.pages:  # the first sequence is read from the new keys
        pages[case.table[0, :5].long()] = torch.nan
    again = paged_attention(
        q, *case.pages, case.table, lengths, case.key_lengths, rule, new=(new[0], new[1])
    )
    assert torch.equal(again, out) or kernels_or_plain == "plain"
