"""A paged KV cache: at most a page less one slot is wasted, and forks share pages until written."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine.page_table import PageTable
from easyllm.engine.pages import Namespace, PagePool
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config
from easyllm.plan.kv_cache import cache_size
from easyllm.verify.laws import through_cache


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"sequences": 20}

    sequences: PositiveInt = Field(default=200, le=5000, description="Number of sequences.")
    longest: PositiveInt = Field(default=2048, ge=64, le=32768, description="Longest, in tokens.")
    page_size: PositiveInt = Field(default=16, le=256, description="Tokens in a page.")


def run(parameters: Parameters) -> Result:
    """Reserves pages for texts of random lengths, forks one, and compares results."""
    generator = torch.Generator().manual_seed(parameters.seed)
    shape = torch.rand(parameters.sequences, generator=generator)
    lengths = [max(1, int(parameters.longest * x**2)) for x in shape.tolist()]
    sizes = sorted({1, 4, parameters.page_size, 64, 256})
    waste = {size: _waste(lengths, size) for size in sizes}
    used = sum(lengths)
    reserved = parameters.longest * len(lengths)
    power = sum(1 << (n - 1).bit_length() for n in lengths)
    most, share = waste[parameters.page_size]
    shared, copied = _fork(parameters.page_size)
    model = new_model(small_config(width=32), parameters.seed).eval()
    ids = torch.randint(64, (40,), generator=generator)
    with torch.no_grad():
        whole = model.logits(ids)
        paged = through_cache(model, ids, [17, 7, *[1] * 16])
    error = float((paged - whole).abs().max())
    opt = cache_size(small_config(layers=40, width=5120), context=1).bytes_per_token
    systems = {
        f"pages of {parameters.page_size}": share,
        "next power of two": 1 - used / power,
        "the longest possible": 1 - used / reserved,
    }
    return Result(
        numbers=[
            number(
                "most_wasted",
                most,
                f"most slots wasted by a sequence, pages of {parameters.page_size}",
                f"单个序列浪费的最多槽位，页长 {parameters.page_size}",
            ),
            number("waste_pages", share, "share of memory wasted, pages", "浪费的内存占比，分页"),
            number(
                "waste_longest",
                1 - used / reserved,
                "reserving the longest possible length",
                "按最大长度预留",
            ),
            number(
                "waste_power",
                1 - used / power,
                "reserving the next power of two",
                "按下一个 2 的幂预留",
            ),
            number("shared", shared, "pages shared by a fork", "分叉后共享的页数"),
            number("copied", copied, "pages copied when the fork writes", "分叉写入时复制的页数"),
            number("error", error, "paged against dense, logits", "分页与稠密之差（logits）", 2),
            number(
                "opt13b",
                opt,
                "KV cache of OPT-13B's shape, B/token",
                "OPT-13B 结构的 KV 缓存，字节/词元",
            ),
            number("opt13b_page", 16 * opt, "bytes in a page of 16", "16 词元一页的字节数"),
        ],
        figures=[
            Bars(
                title="Reserved but unused memory",
                x="how memory is reserved",
                y="share",
                groups=list(systems),
                series={"wasted": list(systems.values())},
            ),
            Lines(
                title="Waste by page size",
                x="tokens in a page",
                y="share wasted",
                lines={"wasted": [(float(size), found[1]) for size, found in waste.items()]},
                log_x=True,
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "vLLM (arXiv 2309.06180): earlier systems used 20.4 to 38.2% of the cache's "
                    "memory; pages of 16 waste at most 15 slots per sequence.",
                    "vLLM（arXiv 2309.06180）：早先的系统只用到缓存内存的 20.4% 至 38.2%；"
                    "16 词元的页每个序列至多浪费 15 个槽位。",
                ),
                (
                    f"Reserving the longest length uses {used / reserved:.1%}, pages "
                    f"{1 - share:.1%}; at most {most} slots are wasted; a fork shares {shared} "
                    f"pages and copies {copied}; logits differ by {error:.0e}.",
                    f"按最大长度预留只用到 {used / reserved:.1%}，分页用到 {1 - share:.1%}；"
                    "至多浪费 "
                    f"{most} 个槽位；分叉共享 {shared} 页、复制 {copied} 页；logits 相差 "
                    f"{error:.0e}。",
                ),
                "reproduced" if most < parameters.page_size and opt == 819_200 else "not",
                (
                    "The lengths are drawn at random, so the shares are those of this draw.",
                    "长度是随机抽取的，因此占比只对应这次抽取。",
                ),
            )
        ],
    )


def _waste(lengths: list[int], page_size: int) -> tuple[int, float]:
    """Returns the most slots that a sequence wastes, and the share of all slots wasted."""
    pool = PagePool(sum(-(-n // page_size) for n in lengths), page_size)
    most, slots = 0, 0
    for length in lengths:
        table = PageTable(pool, Namespace())
        assert table.reserve(0, length, {}), "the pool is large enough for all sequences"
        held = len(table.held) * page_size
        most, slots = max(most, held - length), slots + held
    return most, 1 - sum(lengths) / slots


def _fork(page_size: int) -> tuple[int, int]:
    """Returns the pages that a fork shares with its parent, and those copied at its first token."""
    pool = PagePool(16, page_size)
    table = PageTable(pool, Namespace())
    length = 3 * page_size + page_size // 2
    table.reserve(0, length, {})
    twin = table.fork()
    shared = sum(pool.references(page) == 2 for page in twin.held)
    copies: dict[int, int] = {}
    twin.reserve(length, length + 1, copies)
    return shared, len(copies)


LAB = Lab(
    name="paged-cache",
    rows=(64,),
    chapter="inference",
    title=Text("The paged KV cache", "分页的 KV 缓存"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
