"""What Chinese text needs besides the other rules: its share of Han characters, its function characters, its stop words.

Bounds set on words (Gopher's, FineWeb-2's) do not fit Chinese without a segmenter, so these are set on characters, and
measured (`docs/data.md`): prose is held together by function characters, is written with common characters and with
punctuation. Navigation, keyword lists and random or wrongly decoded characters are not.
"""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat

from easyllm.core.config import Config
from easyllm.data.clean.text import CLOSING_QUOTES, HAN, TERMINAL_PUNCTUATION, TextView
from easyllm.data.clean.violation import Figure, Fraction, Violation, first_violation, ratio

CHINESE_STOP_WORDS = tuple("的年在月是和日了於·為有被人中为他與後也而由于与后")
"""FineWeb-2's for Mandarin (`cmn_Hani`), and the simplified forms of 於, 與 and 後."""
FUNCTION_CHARACTERS = frozenset(
    "的了在是我你您他她它们們这這那有和与與及或而但也都就不没沒很更最又还還再要会會能可被把将將让讓使给給从從到对對向"
    "于於以为為因所其之此着著过過得地个個些一两兩几幾多如若则則等并並且只已曾由自至时時后後前中上下里裡裏内內间間"
    "说說去来來做吗嗎呢吧什么麼谁誰哪怎样樣该該每各某者乎矣焉"
)
"""Particles, pronouns, prepositions, conjunctions, auxiliaries and the like, simplified and traditional."""
ADVERTISING = (
    *("加微信", "加我微信", "微信号", "加QQ", "扫码关注", "扫描二维码", "关注公众号", "点击购买", "立即购买", "立即下单"),
    *("立即咨询", "在线咨询", "免费咨询", "咨询热线", "服务热线", "联系电话", "电话咨询", "客服电话", "全国包邮", "货到付款"),
    *("限时特价", "限时优惠", "限时抢购", "特价促销", "优惠价", "数量有限", "先到先得", "欢迎选购", "欢迎来电", "厂家直销"),
    *("批发价", "正品代购", "诚招代理", "招商加盟", "加盟热线", "代开发票", "代办证件", "办理假证", "贷款咨询", "无抵押贷款"),
    *("六合彩", "时时彩", "百家乐", "真人娱乐", "娱乐城", "博彩", "彩票平台", "送彩金", "注册送", "开户送"),
    *("加微信", "微信號", "立即購買", "全國包郵", "貨到付款", "限時特價", "限時優惠", "免費諮詢", "聯絡電話", "數量有限"),
)  # fmt: skip
"""Phrases of advertisements; one of them means little, several of them in a short text are one."""
BOILERPLATE = (
    *("版权所有", "版權所有", "ICP备", "ICP备案", "公网安备", "网站备案", "免责声明", "隐私政策", "用户协议", "使用条款"),
    *("未经授权", "未經授權", "禁止转载", "转载请注明", "轉載請註明", "责任编辑", "責任編輯", "上一篇", "下一篇", "相关阅读"),
    *("相关文章", "相關文章", "推荐阅读", "推薦閱讀", "猜你喜欢", "返回首页", "返回顶部", "网站地图", "網站地圖", "友情链接"),
    *("友情連結", "设为首页", "加入收藏", "分享到", "点击查看更多", "查看更多", "登录注册", "会员登录", "关于我们", "联系我们"),
    *("技术支持", "Copyright", "All Rights Reserved", "访问统计", "当前位置", "您的位置"),
)  # fmt: skip
"""Phrases of lines that every page of a site has."""

_NOT_HAN = re.compile(f"[^{HAN}]+")
_MARKS = re.compile("[，。！？；：、…,!?;:]")
_ADVERTISING = re.compile("|".join(map(re.escape, sorted(set(ADVERTISING), key=len, reverse=True))))
_BOILERPLATE = re.compile("|".join(map(re.escape, BOILERPLATE)))
_MIN_PHRASES = 3  # distinct ones, below which nothing is called an advertisement
_BOILERPLATE_SHARE = 0.2  # of a line's characters, from which its phrases are what it is about
_FRAGMENT = 40  # characters; a longer line that mentions such a thing is prose


class HanShare(Config):
    """Rejects texts of which too little is written in Han characters; white space is not counted."""

    kind: Literal["han_share"] = "han_share"
    min_share: Fraction = 0.30

    def apply(self, view: TextView) -> TextView | Violation:
        characters = sum(map(len, view.text.split()))
        share = ratio(len(_NOT_HAN.sub("", view.text)), characters)
        return first_violation(self.kind, [Figure("share", share, low=self.min_share)]) or view


class ChineseQuality(Config):
    """Rejects Chinese that is not prose: lists of keywords, gibberish, wrongly decoded text, advertisements.

    Shares are of the text's Han characters. A line of boilerplate is a short one with a phrase like 版权所有 or 上一篇; such
    lines are removed before the rest is judged. None switches a bound off.
    """

    kind: Literal["chinese_quality"] = "chinese_quality"
    drop_boilerplate_lines: bool = True
    min_function_characters: Fraction | None = (
        0.05  # clean paragraphs: 0.13 at the first percentile
    )
    min_common_characters: Fraction | None = 0.85  # of GB 2312's or Big5's first level
    min_punctuation: NonNegativeFloat | None = 0.02  # marks per Han character
    max_advertising: Fraction | None = 0.04  # characters in phrases of advertisements

    def figures(self, view: TextView) -> Iterator[Figure]:
        """The measurements with their bounds, each computed when it is asked for."""
        han = _NOT_HAN.sub("", view.text)
        function = ratio(sum(map(FUNCTION_CHARACTERS.__contains__, han)), len(han))
        yield Figure("function_characters", function, low=self.min_function_characters)
        if self.min_common_characters is not None:
            counted = ratio(sum(map(is_common, han)), len(han))
            yield Figure("common_characters", counted, low=self.min_common_characters)
        marks = ratio(len(_MARKS.findall(view.text)), len(han))
        yield Figure("punctuation", marks, low=self.min_punctuation)
        phrases = _ADVERTISING.findall(view.text)
        told = phrases if len(set(phrases)) >= _MIN_PHRASES else []
        yield Figure(
            "advertising", ratio(sum(map(len, told)), len(view.text)), high=self.max_advertising
        )

    def apply(self, view: TextView) -> TextView | Violation:
        if self.drop_boilerplate_lines and _BOILERPLATE.search(view.text):
            lines = view.text.split("\n")
            view = view.with_text("\n".join(line for line in lines if not is_boilerplate(line)))
        return first_violation(self.kind, self.figures(view)) or view


def is_boilerplate(line: str) -> bool:
    """Whether a line is one that every page of a site has: its phrases are much of it, or it is short and no sentence.

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
    """Whether a Han character is in the first level of GB 2312 or of Big5, which hold the frequent ones.

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
