"""Parameter counts of published models: what their parts add, and what an expert model uses."""

from typing import ClassVar

from pydantic import Field

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.parameter_bars import parameter_bars
from easyllm.models.describe import describe
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.parameters import count_parameters

PUBLISHED = {
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
}
EXPERTS, ACTIVE = 8, 2


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {
        "models": ("qwen1.5-0.5b", "llama2-7b", "mistral-7b", "mixtral-8x7b")
    }

    models: tuple[str, ...] = Field(
        default=tuple(PUBLISHED), min_length=1, max_length=20, description="Published sizes."
    )


def run(parameters: Parameters) -> Result:
    """Counts parameters from the configurations of the models."""
    counts = {name: count_parameters(describe(name)) for name in parameters.models}
    known = [name for name in counts if name in PUBLISHED]
    wrong = [name for name in known if counts[name].total != PUBLISHED[name]]
    mixtral, mistral = (count_parameters(describe(n)) for n in ("mixtral-8x7b", "mistral-7b"))
    layers = describe("mixtral-8x7b").num_layers
    expert = mixtral.inactive // (layers * (EXPERTS - ACTIVE))
    eight = EXPERTS * mistral.total
    window = [cache_size(describe("mistral-7b"), context=n).total for n in (4096, 32_768)]
    return Result(
        numbers=[
            number(
                "equal",
                len(known) - len(wrong),
                "counts equal to the published ones",
                "与公布值相等的个数",
            ),
            number("of", len(known), "of", "总数"),
            *(
                number(f"total_{name}", c.total, f"parameters of {name}", f"{name} 的参数量")
                for name, c in counts.items()
            ),
            number(
                "mixtral_active",
                mixtral.active,
                "active parameters of Mixtral 8x7B",
                "Mixtral 8x7B 每个词元用到的参数量",
            ),
            number(
                "expert", expert, "parameters of one expert in one layer", "一层中一个专家的参数量"
            ),
            number("eight_mistrals", eight, "8 × Mistral 7B", "8 × Mistral 7B"),
            number(
                "rolling_cache",
                window[1],
                "Mistral's KV cache at 32K tokens (window 4,096), B",
                "32K 词元时 Mistral 的 KV 缓存（窗口 4,096），字节",
            ),
        ],
        figures=[
            parameter_bars(counts, log_y=True),
            Bars(
                title="Mixtral 8x7B is not 8 × 7B",
                x="",
                y="parameters, 10⁹",
                groups=["8 × Mistral 7B", "Mixtral, all", "Mixtral, active", "Mistral 7B"],
                series={
                    "parameters": [
                        n / 1e9 for n in (eight, mixtral.total, mixtral.active, mistral.total)
                    ]
                },
            ),
        ],
        claims=[
            claim(
                (
                    "The models' published configurations imply these counts; Qwen1.5 0.5B to 72B, "
                    "Llama 2 7B to 70B, Mistral 7B.",
                    "由公布的配置得到这些参数量：Qwen1.5 0.5B 至 72B、Llama 2 7B 至 70B、Mistral "
                    "7B。",
                ),
                (
                    f"{len(known) - len(wrong)} of {len(known)} counts are equal to the last "
                    "parameter.",
                    f"{len(known)} 个中有 {len(known) - len(wrong)} 个完全相等。",
                ),
                "reproduced" if not wrong else "not",
            ),
            claim(
                (
                    "The article (zhihu 673527090): Mixtral 8x7B has fewer than 56B parameters, "
                    "because only the feed-forward is replicated; two of eight experts run for a "
                    "token.",
                    "文章（知乎 673527090）：Mixtral 8x7B 不到 56B 参数，因为只复制了前馈；"
                    "每个词元使用八个专家中的两个。",
                ),
                (
                    f"{mixtral.total / 1e9:.1f}B in total, {mixtral.active / 1e9:.1f}B active, "
                    f"{expert / 1e6:.0f}M per expert and layer; eight Mistrals would be "
                    f"{eight / 1e9:.1f}B.",
                    f"共 {mixtral.total / 1e9:.1f}B，每个词元用到 {mixtral.active / 1e9:.1f}B，"
                    f"每层每个专家 {expert / 1e6:.0f}M；八个 Mistral 则为 {eight / 1e9:.1f}B。",
                ),
                "reproduced" if mixtral.active == 12_879_925_248 else "not",
            ),
        ],
    )


LAB = Lab(
    name="model-sizes",
    rows=(25, 28, 31),
    chapter="models",
    title=Text("Published models, part by part", "公开模型的各个部分"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
