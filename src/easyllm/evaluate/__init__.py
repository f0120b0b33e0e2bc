"""How good a model is: loss on given answers, and answers of its own."""

from easyllm.evaluate.answers import Answer, AnswerReport, evaluate_answers, key_in_text

__all__ = ["Answer", "AnswerReport", "evaluate_answers", "key_in_text"]
