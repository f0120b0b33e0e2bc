"""Documents to clean, and what a rule does to them."""

from hypothesis import strategies as st

from easyllm.corpus.clean import (
    TextView,
)
from easyllm.corpus.document import Document

ENGLISH = """The harbour was built in the eleventh century, when the river still reached the \
town's western wall.
Merchants came from the north with salt and amber, and they left with cloth that had been dyed in \
the valley above.
After the flood of 1342 the river moved its bed by almost two miles, and the quays fell out of use \
within a generation.
Nobody thought of digging a canal until the council had seen what the neighbouring city earned \
from one.
The work took nineteen years, and most of the men who had begun it did not live to see the first \
boat arrive.
What remains today is a shallow pond, a row of iron rings, and a proverb about patience that the \
children still learn."""


CHINESE = """清晨的菜市场是这座城市最热闹的地方，摊主们在天亮之前就已经把新鲜的蔬菜摆放整齐。
附近的居民提着篮子来来往往，有人为了几毛钱和老板讨价还价，也有人站在豆腐摊前聊起昨晚的球赛。
到了中午，人群渐渐散去，清洁工开始冲洗地面，只留下几只猫在角落里寻找剩下的小鱼。
许多年轻人已经习惯在手机上买菜，但是老人们仍然相信，亲手挑选的东西才最让人放心。"""


def document(text, **fields):
    return Document(id="1", source="test", text=text, **fields)


def outcome(rule, text):
    return rule.apply(TextView(text))


texts = st.text(alphabet=st.sampled_from("ab Z1_é’'.,-#…\n\t•“中文。あ\u0301"), max_size=60)
