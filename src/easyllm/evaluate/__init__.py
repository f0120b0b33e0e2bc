"""Model evaluation: loss, recall, judged comparisons of models, Elo ratings, best-of-n.

Exports are imported lazily: the configuration of a judge, from which the command line makes its
flags, does not load torch.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.evaluate.answers import Answer, AnswerReport, evaluate_answers, key_in_text
    from easyllm.evaluate.elo import Game, Rating, elo_table
    from easyllm.evaluate.judge import Judge
    from easyllm.evaluate.judge_config import JudgeConfig
    from easyllm.evaluate.win_rate import WinRate, win_rate

__all__ = [
    "Answer",
    "AnswerReport",
    "Game",
    "Judge",
    "JudgeConfig",
    "Rating",
    "WinRate",
    "elo_table",
    "evaluate_answers",
    "key_in_text",
    "win_rate",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Answer": "easyllm.evaluate.answers",
        "AnswerReport": "easyllm.evaluate.answers",
        "Game": "easyllm.evaluate.elo",
        "Judge": "easyllm.evaluate.judge",
        "JudgeConfig": "easyllm.evaluate.judge_config",
        "Rating": "easyllm.evaluate.elo",
        "WinRate": "easyllm.evaluate.win_rate",
        "elo_table": "easyllm.evaluate.elo",
        "evaluate_answers": "easyllm.evaluate.answers",
        "key_in_text": "easyllm.evaluate.answers",
        "win_rate": "easyllm.evaluate.win_rate",
    },
)
