"""Quality filters for Chinese: share of Han characters, function characters, advertising.

Thresholds on words (Gopher, FineWeb-2) do not apply to Chinese without a word segmenter, so these
thresholds are on characters, and were measured (`docs/data.md`): prose contains function
characters, common characters and punctuation. Navigation, keyword lists, random characters and
wrongly decoded text do not.
"""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat

from easyllm.core.config import Config
from easyllm.corpus.clean.scripts import HAN
from easyllm.corpus.clean.text import CLOSING_QUOTES, TERMINAL_PUNCTUATION, TextView
from easyllm.corpus.clean.violation import Fraction, Metric, Violation, first_violation, ratio

CHINESE_STOP_WORDS = tuple("的年在月是和日了於·為有被人中为他與後也而由于与后")
"""FineWeb-2's stop words for Mandarin (`cmn_Hani`), and the simplified forms of 於, 與 and 後."""
FUNCTION_CHARACTERS = frozenset(
    "的了在是我你您他她它们們这這那有和与與及或而但也都就不没"
    "沒很更最又还還再要会會能可被把将將让讓使给給从從到对對向"
    "于於以为為因所其之此着著过過得地个個些一两兩几幾多如若"
    "则則等并並且只已曾由自至时時后後前中上下里裡裏内內间間"
    "说說去来來做吗嗎呢吧什么麼谁誰哪怎样樣该該每各某者乎矣焉"
)
"""Function words of one character, simplified and traditional: particles, pronouns, prepositions,
conjunctions, auxiliaries and similar."""
ADVERTISING = (
    *(
        "加微信", "加我微信", "微信号", "加QQ", "扫码关注",
        "扫描二维码", "关注公众号", "点击购买", "立即购买", "立即下单",
    ),
    *(
        "立即咨询", "在线咨询", "免费咨询", "咨询热线", "服务热线",
        "联系电话", "电话咨询", "客服电话", "全国包邮", "货到付款",
    ),
    *(
        "限时特价", "限时优惠", "限时抢购", "特价促销", "优惠价",
        "数量有限", "先到先得", "欢迎选购", "欢迎来电", "厂家直销",
    ),
    *(
        "批发价", "正品代购", "诚招代理", "招商加盟", "加盟热线",
        "代开发票", "代办证件", "办理假证", "贷款咨询", "无抵押贷款",
    ),
    *(
        "六合彩", "时时彩", "百家乐", "真人娱乐", "娱乐城",
        "博彩", "彩票平台", "送彩金", "注册送", "开户送",
    ),
    *(
        "加微信", "微信號", "立即購買", "全國包郵", "貨到付款",
        "限時特價", "限時優惠", "免費諮詢", "聯絡電話", "數量有限",
    ),
)  # fmt: skip
"""Advertising phrases: one is weak evidence, several in a short text are an advertisement."""
BOILERPLATE = (
    *(
        "版权所有", "版權所有", "ICP备", "ICP备案", "公网安备",
        "网站备案", "免责声明", "隐私政策", "用户协议", "使用条款",
    ),
    *(
        "未经授权", "未經授權", "禁止转载", "转载请注明", "轉載請註明",
        "责任编辑", "責任編輯", "上一篇", "下一篇", "相关阅读",
    ),
    *(
        "相关文章", "相關文章", "推荐阅读", "推薦閱讀", "猜你喜欢",
        "返回首页", "返回顶部", "网站地图", "網站地圖", "友情链接",
    ),
    *(
        "友情連結", "设为首页", "加入收藏", "分享到", "点击查看更多",
        "查看更多", "登录注册", "会员登录", "关于我们", "联系我们",
    ),
    *("技术支持", "Copyright", "All Rights Reserved", "访问统计", "当前位置", "您的位置"),
)  # fmt: skip
"""Phrases of boilerplate lines that appear on every page of a site."""

_NOT_HAN = re.compile(f"[^{HAN}]+")
_MARKS = re.compile("[，。！？；：、…,!?;:]")
_ADVERTISING = re.compile("|".join(map(re.escape, sorted(set(ADVERTISING), key=len, reverse=True))))
_BOILERPLATE = re.compile("|".join(map(re.escape, BOILERPLATE)))
_MIN_PHRASES = 3  # minimum number of distinct phrases for a text to count as an advertisement
_BOILERPLATE_SHARE = 0.2  # share of a line's characters in phrases from which it is boilerplate
_FRAGMENT = 40  # maximum characters of a fragment; a longer line with such a phrase is prose


class HanShare(Config):
    """Rejects texts with too small a share of Han characters; white space is not counted."""

    kind: Literal["han_share"] = "han_share"
    min_share: Fraction = Field(0.30, description="Minimum share of Han characters.")

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view unchanged, or the violation that rejects it."""
        characters = sum(map(len, view.text.split()))
        share = ratio(len(_NOT_HAN.sub("", view.text)), characters)
        return first_violation(self.kind, [Metric("share", share, low=self.min_share)]) or view


class ChineseQuality(Config):
    """Rejects Chinese that is not prose: keyword lists, gibberish, mojibake, advertising.

    The ratios are relative to the number of Han characters, except `max_advertising`, which is a
    share of all characters. A boilerplate line is a short line with a phrase such as 版权所有 or
    上一篇; these lines are removed before the rest is measured. None disables a threshold.
    """

    kind: Literal["chinese_quality"] = "chinese_quality"
    drop_boilerplate_lines: bool = Field(
        True, description="Remove short lines with a phrase such as 版权所有 or 上一篇."
    )
    min_function_characters: Fraction | None = Field(
        0.05,
        description="Minimum share of function characters such as 的; the first percentile of "
        "clean paragraphs is 0.13.",
    )
    min_common_characters: Fraction | None = Field(
        0.85, description="Minimum share of characters in level 1 of GB 2312 or Big5."
    )
    min_punctuation: NonNegativeFloat | None = Field(
        0.02, description="Minimum number of punctuation marks per Han character."
    )
    max_advertising: Fraction | None = Field(
        0.04, description="Maximum share of all characters in advertising phrases."
    )

    def figures(self, view: TextView) -> Iterator[Metric]:
        """Yields the metrics with their bounds, each computed lazily."""
        han = _NOT_HAN.sub("", view.text)
        function = ratio(sum(map(FUNCTION_CHARACTERS.__contains__, han)), len(han))
        yield Metric("function_characters", function, low=self.min_function_characters)
        if self.min_common_characters is not None:
            counted = ratio(sum(map(is_common, han)), len(han))
            yield Metric("common_characters", counted, low=self.min_common_characters)
        marks = ratio(len(_MARKS.findall(view.text)), len(han))
        yield Metric("punctuation", marks, low=self.min_punctuation)
        phrases = _ADVERTISING.findall(view.text)
        told = phrases if len(set(phrases)) >= _MIN_PHRASES else []
        yield Metric(
            "advertising", ratio(sum(map(len, told)), len(view.text)), high=self.max_advertising
        )

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the text without boilerplate lines, or the violation that rejects it."""
        if self.drop_boilerplate_lines and _BOILERPLATE.search(view.text):
            lines = view.text.split("\n")
            view = view.with_text("\n".join(line for line in lines if not is_boilerplate(line)))
        return first_violation(self.kind, self.figures(view)) or view


def is_boilerplate(line: str) -> bool:
    """Returns whether a line is boilerplate that appears on every page of a site.

    It is boilerplate if it has such a phrase, and the phrases are a large part of it or the line is
    short and not a sentence.

    >>> is_boilerplate("版权所有 © 某公司"), is_boilerplate("他说，版权属于作者。")
    (True, False)
    """
    line = line.strip()
    phrases = sum(map(len, _BOILERPLATE.findall(line)))
    if not phrases:
        return False
    is_fragment = len(line) <= _FRAGMENT and line[-1] not in TERMINAL_PUNCTUATION | CLOSING_QUOTES
    return is_fragment or phrases >= _BOILERPLATE_SHARE * len(line)


def is_common(character: str) -> bool:
    """Returns whether a Han character is in level 1 of GB 2312 or Big5: the frequent characters.

    >>> is_common("国"), is_common("國"), is_common("鏄")
    (True, True, False)
    """
    known = _COMMON.get(character)
    if known is None:
        known = _COMMON[character] = _in_level(character, "gb2312", 0xB0, 0xD7) or _in_level(
            character, "big5", 0xA4, 0xC6
        )
    return known


_COMMON: dict[str, bool] = {}


def _in_level(character: str, encoding: str, first: int, last: int) -> bool:
    try:
        return first <= character.encode(encoding)[0] <= last
    except UnicodeEncodeError:
        return False
