"""Cleaning Chinese: all kinds of clean paragraphs are kept, all kinds of junk are removed."""

import random

import pytest

from easyllm.corpus.clean import CleanConfig, Cleaner
from easyllm.corpus.clean.chinese import ChineseQuality, is_boilerplate, is_common
from easyllm.corpus.clean.gopher import GopherRepetition
from easyllm.corpus.clean.language import identify_language
from easyllm.corpus.clean.ngrams import NgramStatistics
from easyllm.corpus.clean.normalise import Normalise, simplify_chinese
from easyllm.corpus.clean.text import TextView
from easyllm.corpus.clean.violation import Violation
from easyllm.corpus.document import Document

PRESETS_ZH = ("fineweb-zh", "gopher-zh")
TEA = (
    "茶是世界上消费量仅次于水的饮料，起源于中国西南部。最初人们把茶叶当作药材，"
    "后来才逐渐把它泡在热水里饮用。"
    "到了唐代，喝茶已经成为日常生活的一部分，陆羽还为此写下了专门的著作，对茶的种植、"
    "采摘和冲泡都作了详细的说明。"
)
BRIDGE = (
    "这座桥建于十七世纪，全长三百二十米，由二十四个石拱组成。由于河水在春季常常上涨，"
    "工匠们把桥墩做成了尖形，"
    "这样可以减少水流的冲击。几百年来它经历过多次洪水，但主体结构一直没有损坏，如今仍然可以通行"
)
CLEAN = {
    "an article in one line": TEA,
    "a line without a full stop": BRIDGE,
    "a heading and a paragraph": f"茶的历史\n{TEA}",
    "a heading alone in front of a line without a full stop": f"古桥\n\n{BRIDGE}",
    "several paragraphs": f"{TEA}\n\n{BRIDGE}。",
    "dialogue": "“你昨天去哪儿了？”她问。\n“我在图书馆里看书，”他回答说，“看着看着就忘了时间。”\n"
    "“那你为什么不接电话？”\n“手机没有电了。我出来的时候天已经黑了，路上又下起了雨，"
    "所以很晚才到家。”",
    "figures": "2019年，该市常住人口为1,235.6万人，比上一年增长了2.3%，其中城镇人口占76.5%。"
    "全年地区生产总值达到"
    "1.8万亿元，人均约14.6万元，在全省的十一个市中排名第二，仅次于省会。",
    "names in Latin letters": "Linux 是一个开源的操作系统内核，最早由 Linus Torvalds 在 1991 "
    "年发布。它与 "
    "GNU "
    "的工具一起"
    "构成了完整的系统，现在被广泛用于服务器、手机和超级计算机，"
    "几乎所有的云平台都是建立在它之上的。",
    "a list inside a text": "准备这道菜需要以下几样东西，都可以在一般的市场里买到：\n- "
    "两个鸡蛋，最好是新鲜的\n- "
    "一碗隔夜的米饭\n"
    "- 一些切碎的葱花\n先把鸡蛋打散，用小火炒到半熟，然后把米饭倒进去一起翻炒，"
    "最后撒上葱花就可以了。",
    "an old text": "先帝创业未半而中道崩殂，今天下三分，益州疲弊，此诚危急存亡之秋也。"
    "然侍卫之臣不懈于内，忠志之士忘身于外者，"
    "盖追先帝之殊遇，欲报之于陛下也。",
    "traditional characters": "這座圖書館位於舊城的中心，三年前才完成整修。除了豐富的藏書以外，"
    "它還為讀者準備了安靜的自習室，"
    "每到週末都有許多學生在這裡看書。管理員說，最受歡迎的是靠著窗戶的那幾個座位。",
    "a mention of rights and phone numbers": "作者在书中写道，未经授权的翻印曾经是他最头疼的问题，"
    "出版社为此打了三年的官司。"
    "后来他把联系电话"
    "印在扉页上，请读者发现盗版时告诉他，结果收到了很多热心人的来信。",
    "a name said five times": "该办法规定，山区公共图书馆由县级文化部门负责建设，"
    "山区公共图书馆的馆长应当具备相应的专业资格，山区公共图书馆每年的"
    "购书经费不得挪用；新建山区公共图书馆之前，应当听取居民的意见，"
    "关闭山区公共图书馆须经省里批准。",
    "a word in every clause": "每个人的情况都不相同，有的人三天就好，有的人要一周；有的人吃不下饭，"
    "有的人胃口很好；"
    "有的人整夜睡不着，"
    "有的人倒头便睡，所以不要拿别人的经验来判断自己，还是先去问问医生再说。",
    "an announcement of few particles": "各地气象部门密切监测台风动向，及时发布预警信息，加强水库、"
    "河道、"
    "堤防巡查，"
    "落实山洪灾害防御措施，组织危险区域"
    "群众提前转移，确保人民生命财产安全，努力减少灾害损失。",
    "a chat without full stops": "我昨天买的那本书还没有到\n你可以帮我查一下吗，"
    "谢谢\n订单里写的是今天上午\n好的，"
    "我再等一会儿看看\n如果还是没有到就退掉吧",
    "a short paragraph": "六次获奖的歌手在开幕式上献唱了国歌，"
    "而另一位演员则在旁边用手语把歌词翻译给了现场的观众。",
}
NAVIGATION = [
    *("首页", "新闻中心", "产品展示", "解决方案", "成功案例", "关于我们", "联系我们"),
    *("人才招聘", "在线留言", "网站地图", "友情链接", "会员登录", "购物车", "帮助中心"),
]
RANDOM = random.Random(7)
HAN = [chr(c) for c in range(0x4E00, 0x9FA6)]
COMMON = [c for c in HAN if is_common(c)]
JUNK = {
    "a menu, an entry a line": "\n".join(NAVIGATION * 2),
    "a menu in one line": " | ".join(NAVIGATION * 2),
    "a menu in one line of spaces": "  ".join(NAVIGATION * 2),
    "a sitemap": "\n".join(f"{a} > {b}" for a in NAVIGATION[:6] for b in NAVIGATION[6:10]),
    "keywords": "减肥药排行榜 减肥药哪种好 最有效的减肥药 快速减肥药 减肥药副作用 减肥药批发 "
    "减肥药价格 减肥产品代理 瘦身胶囊 排毒养颜 "
    "美白祛斑 淘宝减肥药 韩国减肥药 日本减肥药 减肥药官网 减肥药招商",
    "keywords with marks": "二手手机，二手手机价格，二手手机回收，二手手机报价，二手手机市场，"
    "二手手机批发，"
    "二手手机网站，二手手机转让，"
    "二手手机专卖，二手手机交易",
    "a sentence over and over": "这个产品真的非常好用，推荐给大家。" * 12,
    "a line over and over": "点击这里可以看到更多的精彩内容。\n" * 10,
    "two lines in turn": "今天的天气真的很好啊。\n我们一起去公园里玩吧。\n" * 8,
    "boilerplate": "版权所有 © 2019 某某科技有限公司\n京ICP备12345678号-1 "
    "京公网安备11010502030143号\n未经授权禁止转载\n免责声明 隐私政策\n"
    "联系我们 网站地图\n技术支持：某某网络\n上一篇：某某新闻\n下一篇：某某通知\n责任编辑：某某",
    "an advertisement": "【限时特价】全国包邮！正品代购，支持货到付款！加微信：abc12345 "
    "咨询客服，立即购买享受五折优惠！数量有限，先到先得！"
    "联系电话：400-123-4567，QQ：123456789，点击链接立即下单，错过再等一年！",
    "an advertisement of services": "本公司专业代开发票，办理各类证件，诚信经营，价格优惠。"
    "联系电话：138-0000-0000，"
    "加微信同号，欢迎来电咨询！"
    "另有代办证件、无抵押贷款等业务，二十四小时服务热线，当天就可以办好，先办后付款。",
    "gambling": "全网最大的彩票平台，注册送88元彩金，百家乐、时时彩、六合彩应有尽有！"
    "真人娱乐在线开户，开户送千元大礼，提款三分钟到账，"
    "信誉保证，是您的最佳选择！",
    "gibberish of all characters": "".join(RANDOM.choices(HAN, k=300)),
    "gibberish of common characters": "".join(RANDOM.choices(COMMON, k=300)),
    "gibberish with punctuation": "".join(
        "".join(RANDOM.choices(COMMON, k=12)) + "，" for _ in range(20)
    ),
    "UTF-8 read as GBK": "".join(CLEAN[name] for name in ("dialogue", "figures"))
    .encode()
    .decode("gb18030", "ignore"),
    "GBK read as Latin": TEA.encode("gb18030").decode("latin-1"),
    "lost characters": "锟斤拷" * 60,
    "English under a Chinese title": "关于茶\nTea is the most widely consumed drink in the world "
    "after "
    "water. "
    "It "
    "was "
    "first used as a medicine, "
    "and later people began to drink it with hot water. 茶很好喝。",
    "Japanese": "お茶は世界で水の次に多く飲まれている飲み物です。最初は薬として使われていましたが、"
    "のちにお湯に入れて飲むようになりました。",
    "figures alone": "\n".join(f"{n}月{n}日 {n * 13}.5 {n * 7}% {n * 3}" for n in range(1, 30)),
    "nothing to speak of": "页面不存在",
    "a short menu": "\n".join(NAVIGATION[:7]),
    "a short list of keywords": "北京旅游攻略 北京旅游景点 北京旅游线路 北京旅游价格 北京一日游 "
    "北京三日游 "
    "北京旅行社电话 北京特产购买 北京酒店预订 北京机票预订",
    "a short phrase over and over": "点击进入官网，" * 10,
    "two short phrases over and over": "今天真的很好，我们去看看吧。" * 5,
    "a short list of titles": "【正版图书】世界名画鉴赏指南 金装典藏版 全三册 "
    "【正版图书】中国书法经典字帖 "
    "楷书行书草书 小学生课外读物 包邮",
}


def clean(preset, text):
    return Cleaner(CleanConfig(preset=preset)).clean(Document(id="1", source="s", text=text))


@pytest.mark.parametrize("preset", PRESETS_ZH)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_chinese_is_kept(preset, name):
    result = clean(preset, CLEAN[name])
    assert isinstance(result, Document), (result.rule, result.value)
    assert result.text == Normalise(form="NFKC").apply(TextView(CLEAN[name])).text


@pytest.mark.parametrize("preset", PRESETS_ZH)
@pytest.mark.parametrize("name", JUNK)
def test_planted_junk_is_removed(preset, name):
    assert not isinstance(clean(preset, JUNK[name]), Document)


@pytest.mark.parametrize("preset", PRESETS_ZH)
def test_lines_of_boilerplate_are_removed_from_a_page(preset):
    page = f"当前位置：首页 > 饮食 > 茶\n{TEA}\n责任编辑：某某\n上一篇：咖啡\n版权所有 © 某公司"
    assert clean(preset, page).text == TEA


def test_the_english_preset_keeps_no_chinese():
    assert clean("gopher", TEA).rule == "language.code"


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("keywords", "function_characters"),
        ("a menu in one line of spaces", "punctuation"),
        ("gibberish of common characters", "function_characters"),
        ("UTF-8 read as GBK", "common_characters"),
        ("an advertisement", "advertising"),
        ("gambling", "advertising"),
    ],
)
def test_a_limit_of_chinese_quality_can_be_disabled(name, figure):
    text = JUNK[name]
    only = dict.fromkeys(
        ("min_function_characters", "min_common_characters", "min_punctuation", "max_advertising")
    )
    field = f"max_{figure}" if figure == "advertising" else f"min_{figure}"
    default = getattr(ChineseQuality(), field)
    assert isinstance(ChineseQuality(**only).apply(TextView(text)), TextView)
    broken = ChineseQuality(**(only | {field: default})).apply(TextView(text))
    assert broken.rule == f"chinese_quality.{figure}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("版权所有 © 2019 某某公司", True),
        ("未经授权，禁止转载。", True),
        ("责任编辑：王某", True),
        ("他说，未经授权的翻印曾经是最让他头疼的问题，为此还打了三年的官司。", False),
        ("茶是一种饮料。", False),
        (
            "这本书的版权所有者后来把它交给了图书馆，图书馆又把它印了出来，"
            "送给了每一个来看书的人，一直到今天",
            False,
        ),
    ],
)
def test_a_sentence_that_mentions_rights_is_not_boilerplate(line, expected):
    assert is_boilerplate(line) == expected


def test_chinese_without_kana_is_not_mistaken_for_japanese():
    assert identify_language(CLEAN["an old text"])[0] == "zh"
    assert identify_language(JUNK["Japanese"])[0] == "ja"


def test_the_complete_text_is_used_and_text_without_letters_has_no_language():
    english = "This is an English sentence, written in front of everything. " * 2
    assert identify_language(english)[0] == "en"
    assert identify_language(english + TEA * 5)[0] == "zh"
    assert identify_language(english[:80])[0] == "en"
    for text in ("", " ", "2024 12:30 99%", "😀😀🎉", "，。！"):
        assert identify_language(text) == ("und", 0.0)


def test_text_without_han_characters_is_ignored():
    assert ChineseQuality().apply(TextView("")).rule == "chinese_quality.function_characters"
    assert (
        ChineseQuality(
            min_function_characters=None, min_common_characters=None, min_punctuation=None
        )
        .apply(TextView("tea"))
        .text
        == "tea"
    )


def test_ngrams_of_chinese_count_characters():
    text = "北京大学很大，北京大学很老，去北京大学的路"
    statistics = NgramStatistics(TextView(text).words)
    assert statistics.top_characters(4) == 12
    assert statistics.top_characters(2) == 6
    assert NgramStatistics(["to", "be", "or", "not", "to", "be"]).top_characters(2) == 10
    assert NgramStatistics(TextView("用 GPU 训练，用 GPU 推理").words).top_characters(2) == 8


def test_the_repetition_limit_depends_on_the_length_of_a_paragraph():
    sentence = CLEAN["a name said five times"]
    for rule in (
        GopherRepetition(max_top_ngram_characters={6: 0.2}),
        GopherRepetition(max_top_ngram_characters={6: 0.2}, min_ngram_text=100),
    ):
        assert rule.apply(TextView(sentence)).rule.startswith("gopher_repetition.")
    long_enough = GopherRepetition(
        max_top_ngram_characters={6: 0.25},
        max_duplicate_ngram_characters={6: 0.25},
        min_ngram_text=150,
    )
    assert isinstance(long_enough.apply(TextView(sentence)), TextView)
    assert isinstance(long_enough.apply(TextView(sentence * 3)), Violation)


@pytest.mark.parametrize(
    "text",
    [CLEAN["an announcement of few particles"], CLEAN["an old text"], BRIDGE, TEA],
)
def test_chinese_without_kana_is_chinese_for_any_uncertain_prediction(text):
    language, score = identify_language(text)
    assert language == "zh"
    assert score > 0.85


def test_confident_predictions_of_wu_and_japanese_are_kept():
    wu = (
        "上海闲话是吴语个一种方言，渠拉勒拉上海讲，阿拉侪是上海人，侬好伐？今朝天气蛮好个，"
        "大家侪出去白相。"
    )
    assert identify_language(wu)[0] == "wuu"
    assert (
        identify_language(
            "東京は日本の首都であり、世界でも最大級の都市のひとつである。人口は約千四百万人。"
        )[0]
        == "ja"
    )


# traditional to simplified


def test_taiwanese_characters_become_mainland_ones():
    taiwan = (
        "她看著窗外，想著那本著名的著作，接著穿著外套，意味著要走了。裡面的頭髮很乾淨，"
        "乾隆與皇后在後面。"
    )
    assert simplify_chinese(taiwan) == (
        "她看着窗外，想着那本著名的著作，接着穿着外套，意味着要走了。里面的头发很干净，"
        "乾隆与皇后在后面。"
    )
    assert simplify_chinese(taiwan, "t2s").startswith("她看著窗外，想著那本著名的著作")


def test_ambiguous_characters_are_converted_by_context():
    assert simplify_chinese("原著、編著、土著、名著、專著、合著、譯著、論著和巨著都很顯著") == (
        "原著、编著、土著、名著、专著、合著、译著、论著和巨著都很显著"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(False, "看著"), (True, "看着"), ("tw2s", "看着"), ("t2s", "看著"), ("hk2s", "看著")],
)
def test_the_conversion_is_an_option_of_the_rule(given, expected):
    text = "她一直{}窗外的風景，心裡想的卻是昨天在圖書館裡遇到的那個人，不知道還會不會再見到他。"
    found = Normalise(simplify_chinese=given).apply(TextView(text.format("看著"))).text
    assert expected in found
    assert ("风景" in found) == bool(given)


@pytest.mark.parametrize("language", [None, "ja"])
def test_japanese_is_not_simplified(language):
    text = "漢字と仮名を使って、図書館で本を読みました。経済の発展について書かれた本でした。"
    assert Normalise(simplify_chinese=True).apply(TextView(text, language)).text == text


def test_a_declared_language_is_trusted():
    title = "經濟發展"  # too short to be distinguished from Japanese
    assert Normalise(simplify_chinese=True).apply(TextView(title, "zh")).text == "经济发展"
    assert Normalise(simplify_chinese=True).apply(TextView(title, "ja")).text == title


def test_a_preset_simplifies_the_text_it_keeps():
    config = CleanConfig(preset="fineweb-zh", override={"normalise": {"simplify_chinese": True}})
    result = Cleaner(config).clean(
        Document(id="1", source="s", text=CLEAN["traditional characters"])
    )
    assert "最受欢迎的是靠着窗户" in result.text
