"""HTML pages of every structure with declared main text and boilerplate, to measure extractors."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Page:
    """A page, the pieces of its main text, and the pieces of its boilerplate."""

    name: str
    html: str
    main: tuple[str, ...]
    furniture: tuple[str, ...]


LONG = (
    "Tea is the most widely consumed drink in the world after water, and its history "
    "reaches back thousands of years.",
    "At first the leaves were chewed or boiled as a medicine; only much later did people "
    "begin to drink tea for pleasure.",
    "By the ninth century a whole book had been written about how to plant it, how to "
    "roast it and how to serve it.",
)
ZH = (
    "茶是世界上消费量仅次于水的饮料，起源于中国西南部，最初人们把茶叶当作药材来使用。",
    "到了唐代，喝茶已经成为日常生活的一部分，有人为此写下了专门的著作。",
    "今天，各地的茶馆仍然是人们聊天、休息和谈生意的地方。",
)


def p(*texts: str) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def items(*texts: str) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def links(*texts: str) -> str:
    return "".join(f'<li><a href="/{n}">{escape(text)}</a></li>' for n, text in enumerate(texts))


RIVERS = tuple(f"River number {n} of the long list" for n in range(40))
DISHES = ("Soup of the day with bread", "Grilled trout with lemon", "Pancakes with honey")
STEPS = (
    "Warm the pot with hot water.",
    "Add one spoon of leaves for each cup.",
    "Wait for three minutes, then pour.",
)
TERMS = {
    "Oolong": "A tea that is partly oxidised.",
    "Sencha": "A green tea that is steamed.",
    "Pu-erh": "A tea that ages.",
}
CODE = "def brew(leaves):\n    water = boil()\n\treturn water + leaves  # <hot>"
TITLE = "On tea and its history"

SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "paragraphs": (p(*LONG), LONG),
    "a short article": (p("Closed on Monday."), ("Closed on Monday.",)),
    "a long article": (
        p(*(f"Part {n}. {t}" for n in range(20) for t in LONG)),
        tuple(f"Part {n}. {t}" for n in range(20) for t in LONG),
    ),
    "bullets": (
        p(LONG[0]) + f"<ul>{items(*DISHES)}</ul>" + p(LONG[1]),
        (LONG[0], *DISHES, LONG[1]),
    ),
    "bullets alone": (f"<ul>{items(*DISHES, *STEPS)}</ul>", (*DISHES, *STEPS)),
    "bullets of paragraphs": (
        f"<ul>{''.join(f'<li>{p(a, b)}</li>' for a, b in zip(LONG, STEPS, strict=True))}</ul>",
        (*LONG, *STEPS),
    ),
    "bullets that begin with links": (
        "<ul>"
        + "".join(f'<li><a href="{n}">{n}</a>: {t}</li>' for n, t in TERMS.items())
        + "</ul>",
        (*TERMS, *TERMS.values()),
    ),
    "two links between paragraphs": (
        p(LONG[0]) + f"<ul>{links('A tea shop', 'A tea house')}</ul>" + p(LONG[1]),
        (LONG[0], "A tea shop", "A tea house", LONG[1]),
    ),
    "two links between paragraphs of Chinese": (
        p(ZH[0]) + f"<ol>{links('一家茶店', '一家茶馆')}</ol>" + p(ZH[1]),
        (ZH[0], "一家茶店", "一家茶馆", ZH[1]),
    ),
    "lists named after a place": (
        p(LONG[0])
        + f'<ul class="sidebar-list">{items(*DISHES)}</ul>'
        + p(LONG[1])
        + f'<div class="footer-links"><ul>{links(*STEPS)}</ul></div>'
        + p(LONG[2]),
        (LONG[0], *DISHES, LONG[1], *STEPS, LONG[2]),
    ),
    "numbers": (p(LONG[0]) + f"<ol>{items(*STEPS)}</ol>", (LONG[0], *STEPS)),
    "lists in lists": (
        p(LONG[0])
        + f"<ul><li>{DISHES[0]}<ol>{items(*STEPS)}</ol></li><li>{DISHES[1]}<ul><li>{DISHES[2]}"
        f"<ul>{items('salt')}</ul></li></ul></li></ul>",
        (LONG[0], *DISHES, *STEPS, "salt"),
    ),
    "a list that is the article": (
        p("The rivers of the country:") + f"<ul>{items(*RIVERS)}</ul>",
        ("The rivers of the country:", *RIVERS),
    ),
    "a list of links that is the article": (f"<ul>{links(*RIVERS)}</ul>", RIVERS),
    "lists of links under headings": (
        "".join(
            f"<h2>Letter {c}</h2><ul>{links(*RIVERS[n : n + 8])}</ul>"
            for n, c in ((0, "A"), (8, "B"), (16, "C"))
        ),
        ("Letter A", "Letter B", "Letter C", *RIVERS[:24]),
    ),
    "definitions": (
        "<dl>" + "".join(f"<dt>{t}</dt><dd>{d}</dd>" for t, d in TERMS.items()) + "</dl>",
        (*TERMS, *TERMS.values()),
    ),
    "definitions in groups": (
        p(LONG[0])
        + "<dl>"
        + "".join(f"<div><dt>{t}</dt><dd><p>{d}</p></dd></div>" for t, d in TERMS.items())
        + "</dl>",
        (LONG[0], *TERMS, *TERMS.values()),
    ),
    "a table": (
        p(LONG[0]) + "<table><caption>Kinds of tea</caption><thead><tr><th>Kind</th><th>What it "
        "is</th></tr></thead><tbody>"
        + "".join(f"<tr><td>{t}</td><td><p>{d}</p></td></tr>" for t, d in TERMS.items())
        + "</tbody></table>",
        (LONG[0], "Kinds of tea", "Kind | What it is", *(f"{t} | {d}" for t, d in TERMS.items())),
    ),
    "a table of links": (
        "<table>"
        + "".join(
            f'<tr><td><a href="x">{r}</a></td><td>{n} km</td></tr>'
            for n, r in enumerate(RIVERS[:12])
        )
        + "</table>",
        tuple(f"{r} | {n} km" for n, r in enumerate(RIVERS[:12])),
    ),
    "code": (
        p(LONG[0]) + f"<pre><code>{escape(CODE)}</code></pre>" + p(LONG[1]),
        (LONG[0], CODE, LONG[1]),
    ),
    "code in a list": (
        f"<ol><li>{STEPS[0]}<pre>{escape(CODE)}</pre></li>{items(STEPS[1])}</ol>",
        (STEPS[0], *CODE.split("\n"), STEPS[1]),
    ),
    "a quotation": (
        p(LONG[0]) + f"<blockquote><p>{LONG[1]}</p><footer>An old tea book, <cite>chapter "
        "one</cite></footer></blockquote>",
        (LONG[0], LONG[1], "An old tea book, chapter one"),
    ),
    "figures": (
        p(LONG[0]) + '<figure><img src="a.png" alt="x"><figcaption>A cup of tea, half '
        "empty</figcaption></figure>"
        f"<figure><pre>{escape(CODE)}</pre><figcaption>How it is brewed</figcaption></figure>"
        + p(LONG[1]),
        (LONG[0], "A cup of tea, half empty", CODE, "How it is brewed", LONG[1]),
    ),
    "details": (
        p(LONG[0]) + f"<details><summary>How long does it take?</summary>{p(STEPS[2])}</details>",
        (LONG[0], "How long does it take?", STEPS[2]),
    ),
    "questions behind buttons": (
        "".join(
            f'<h3><button aria-expanded="true">Question {n}?</button></h3><div '
            f'class="panel">{p(t)}</div>'
            for n, t in enumerate(LONG)
        ),
        ("Question 0?", "Question 1?", "Question 2?", *LONG),
    ),
    "a header and a footer in the article": (
        '<header><h2>Part one</h2><p class="byline">By Ann Other, 3 '
        f"May</p></header>{p(*LONG)}<footer>{p('The author lives in a small town.')}</footer>",
        ("Part one", "By Ann Other, 3 May", *LONG, "The author lives in a small town."),
    ),
    "an aside in the article": (
        p(LONG[0]) + f"<aside>{p(STEPS[0])}</aside>" + p(LONG[1]),
        (LONG[0], STEPS[0], LONG[1]),
    ),
    "formulas": (
        p(LONG[0]) + "<p>It cools as <math><semantics><mrow><mi>T</mi></mrow><annotation "
        'encoding="application/x-tex">T = e^{-kt}</annotation>'
        '</semantics></math> and <script type="math/tex">k > 0</script> holds for '
        "H<sub>2</sub>O and <math><mi>y</mi><mo>=</mo><mn>1</mn></math>.</p>",
        (LONG[0], "It cools as $T = e^{-kt}$ and $k > 0$ holds for H2O and y=1."),
    ),
    "formulas with a drawn twin": (
        '<p>Here <span class="katex"><span class="katex-mathml"><math><mi>x</mi><annotation '
        'encoding="application/x-tex">x^2</annotation></math></span>'
        '<span class="katex-html" aria-hidden="true">x2</span></span> and <span '
        'class="mwe-math-element"><span style="display: none;">'
        '<math alttext="{\\displaystyle z}"><mi>z</mi></math></span><img aria-hidden="true" '
        'src="z.svg"></span> end.</p>',
        ("Here $x^2$ and ${\\displaystyle z}$ end.",),
    ),
    "text in divisions": ("".join(f"<div>{t}</div>" for t in LONG), LONG),
    "lines of a poem": (f"<p>{'<br>'.join(STEPS)}</p>", STEPS),
    "inline elements": (
        '<p>Some <b>bold</b>, <i>slanted</i>, <code>x = 1</code>, <a href="x">linked</a>, '
        f"<q>quoted</q> and <del>old</del> words.</p>{p(LONG[0])}",
        ("Some bold, slanted, x = 1, linked, quoted and old words.", LONG[0]),
    ),
    "a list of sources": (
        p(LONG[0])
        + '<ol class="references">'
        + "".join(
            f'<li>Ann Other, <a href="x">A book about part {n} of tea</a>, 19{n}0.</li>'
            for n in range(5)
        )
        + "</ol>",
        (LONG[0], *(f"Ann Other, A book about part {n} of tea, 19{n}0." for n in range(5))),
    ),
    "sections with headings": (
        "".join(f"<section><h2>Chapter {n}</h2>{p(t)}</section>" for n, t in enumerate(LONG)),
        ("Chapter 0", "Chapter 1", "Chapter 2", *LONG),
    ),
    "Chinese": (p(*ZH), ZH),
    "Chinese lists": (
        "<h2>茶的种类</h2><ul>"
        f"{items('绿茶：不经过发酵。', '红茶：完全发酵。', '乌龙茶：部分发酵。')}</ul>"
        f"{p(ZH[0])}<ol>{items('先烧水', '再放茶叶')}</ol>",
        (
            "茶的种类",
            "绿茶：不经过发酵。",
            "红茶：完全发酵。",
            "乌龙茶：部分发酵。",
            ZH[0],
            "先烧水",
            "再放茶叶",
        ),
    ),
    "Chinese in broken lines": ("<p>" + ZH[0].replace("，", "，\n  ") + "</p>", (ZH[0],)),
    "Chinese with readings": (
        "<p><ruby>漢<rt>hàn</rt>字<rt>zì</rt></ruby>是一种很古老的文字，" + ZH[1] + "</p>",
        ("漢字是一种很古老的文字，" + ZH[1],),
    ),
    "a form around a text": (
        f'<form action="/answer">{p(*LONG)}<fieldset><legend>Question</legend>{p(*STEPS)}'
        "</fieldset></form>",
        (*LONG, "Question", *STEPS),
    ),
    "sections named after their headings": (
        f'<section id="cookies"><h2>Cookies</h2>{p(LONG[0])}</section><section '
        f'id="related-work"><h2>Related work</h2>{p(LONG[1])}</section>'
        '<div class="social-history"><h3 class="code-header"><a href="x">Social '
        f"history</a></h3>{p(LONG[2])}</div>",
        ("Cookies", LONG[0], "Related work", LONG[1], "Social history", LONG[2]),
    ),
    "words that name boilerplate": (
        f'<div class="menu"><h2>Menu of the day</h2>{p(*DISHES)}</div><div '
        f'class="header-note">{p(LONG[0])}</div>'
        '<p class="share">Every shareholder got a share of 3%.</p><ul '
        f'class="tabs-example">{items(*STEPS)}</ul>',
        ("Menu of the day", *DISHES, LONG[0], "Every shareholder got a share of 3%.", *STEPS),
    ),
}

NAV = ("Home page", "Products", "News desk", "Support", "Contact form")
TRAIL = ("Start", "Kitchen", "Drinks")
RECENT = ("Ten kinds of coffee", "Why we sleep so badly", "A visit to the harbour")
SHARES = ("Facebook", "Twitter", "WhatsApp")
LEGAL = ("Imprint", "Terms of service", "Privacy notice")
COOKIE = "We use cookies to improve your visit. By going on you accept this."
COPYRIGHT = "© 2024 Example Company. All rights reserved."
SIGN_UP = "Get our newsletter every week"
ZH_NAV = ("网站首页", "新闻中心", "产品展示", "在线留言", "关于我们")
ZH_RECENT = ("十种咖啡的做法", "为什么睡不好觉", "海港一日游")
ZH_COPYRIGHT = "版权所有 © 2024 某某公司 京ICP备12345678号"

LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "main and article": (
        f"<header><a href='/'>Logo</a><nav><ul>{links(*NAV)}</ul></nav></header><main><nav "
        f"aria-label='breadcrumb'><ol>{links(*TRAIL)}</ol></nav>"
        f"<article><h1>{TITLE}</h1>@<ul "
        f"class='share-buttons'>{links(*SHARES)}</ul></article></main><aside><h2>Latest "
        f"posts</h2><ul>{links(*RECENT)}</ul></aside>"
        f"<footer><ul>{links(*LEGAL)}</ul><p>{COPYRIGHT}</p></footer><div "
        f"id='cookie-banner'><p>{COOKIE}</p><button>OK</button></div>",
        (*NAV, *TRAIL, *SHARES, *RECENT, *LEGAL, COPYRIGHT, COOKIE, "Latest posts", "Logo"),
    ),
    "classes alone": (
        "<div id='wrapper' class='has-sidebar with-menu'><div class='site-header'><ul "
        f"class='main-menu'>{links(*NAV)}</ul></div>"
        f"<div class='breadcrumbs'>{' &gt; '.join(f'<a href=x>{t}</a>' for t in TRAIL)}</div>"
        f"<div id='content'><h1>{TITLE}</h1>@"
        f"<div class='social-share'>{''.join(f'<a href=x>{t}</a> ' for t in SHARES)}</div>"
        f"</div><div class='sidebar'><h3>Latest posts</h3><ul>{links(*RECENT)}</ul></div>"
        f"<div id='footer'><p>{COPYRIGHT}</p>{''.join(f'<a href=x>{t}</a> ' for t in LEGAL)}"
        f"</div></div><div class='gdpr-consent'>{COOKIE}</div>",
        (*NAV, *TRAIL, *SHARES, *RECENT, *LEGAL, COPYRIGHT, COOKIE, "Latest posts"),
    ),
    "no names at all": (
        f"<ul>{links(*NAV)}</ul><ul>{links(*TRAIL[:2])}<li>{TRAIL[2]}</li></ul><div><h1>"
        f"{TITLE}</h1>@<ul>{links(*SHARES)}</ul></div>"
        f"<p>{' | '.join(f'<a href=x>{t}</a>' for t in LEGAL)}</p><p>{COPYRIGHT}</p>",
        (*NAV, *TRAIL, *SHARES, *LEGAL, COPYRIGHT),
    ),
    "an article with its header": (
        f"<div role='navigation'><ul>{links(*NAV)}</ul></div><article><header><h1>{TITLE}</h1>"
        "</header>@"
        "<footer class='entry-footer'>Tags: "
        f"{''.join(f'<a href=x>{t}</a> ' for t in TRAIL)}</footer></article>"
        f"<section class='related-posts'><h2>Related</h2><ul>{links(*RECENT)}</ul></section>"
        f"<footer><p>{COPYRIGHT}</p></footer>",
        (*NAV, *TRAIL, *RECENT, COPYRIGHT),
    ),
    "related posts under a heading": (
        f"<main><h1>{TITLE}</h1>@<h3>You might also "
        f"like</h3><ul>{links(*RECENT)}</ul></main><footer>{COPYRIGHT}</footer>",
        (*RECENT, COPYRIGHT, "You might also like"),
    ),
    "a form around the page": (
        "<body class='page-with-sidebar menu-open'><form id='aspnetForm'><input "
        "type='hidden' value='x'><div "
        f"id='topnav'>{''.join(f'<a href=x>{t}</a> ' for t in NAV)}</div>"
        f"<div><h1>{TITLE}</h1>@</div><div hidden>{COOKIE}</div><div style='display: "
        f"none'>{SIGN_UP}</div></form>"
        f"<form class='signup'><p>{SIGN_UP}</p><input type='email'></form></body>",
        (*NAV, COOKIE, SIGN_UP),
    ),
    "Chinese, with tables for layout": (
        f"<table><tr><td colspan=2>{' | '.join(f'<a href=x>{t}</a>' for t in ZH_NAV)}</td>"
        f"</tr><tr><td><ul>{links(*ZH_RECENT)}</ul></td>"
        f"<td><h1>{TITLE}</h1>@</td></tr><tr><td colspan=2>{ZH_COPYRIGHT}</td></tr></table>",
        (*ZH_NAV, *ZH_RECENT, ZH_COPYRIGHT),
    ),
    "Chinese, with divisions": (
        f"<div class='daohang'><ul>{links(*ZH_NAV)}</ul></div><div "
        "class='mianbaoxie'>当前位置：<a href='/'>网站首页</a> &gt; 正文</div><div "
        f"class='con'><h1>{TITLE}</h1>@"
        "<div class='fenxiang'><a>微信</a><a>微博</a><a>QQ空间</a></div></div><div "
        f"class='right'><h3>相关阅读</h3><ul>{links(*ZH_RECENT)}</ul></div>"
        f"<div class='foot'><p>{ZH_COPYRIGHT}</p></div>",
        (*ZH_NAV, *ZH_RECENT, ZH_COPYRIGHT, "当前位置", "微博", "相关阅读"),
    ),
}
"""`@` is replaced by the main text."""


def pages() -> Iterator[Page]:
    """Yields every structure of main text in every layout."""
    for shape, (main, texts) in SHAPES.items():
        for layout, (around, furniture) in LAYOUTS.items():
            html = around.replace("@", main)
            html = html if "<body" in html else f"<body>{html}</body>"
            head = (
                "<!doctype html><html><head><meta charset=utf-8><title>Tea | "
                "Site</title><style>a{}</style><script>var menu = 1</script></head>"
            )
            yield Page(f"{shape} / {layout}", f"{head}{html}</html>", (TITLE, *texts), furniture)
