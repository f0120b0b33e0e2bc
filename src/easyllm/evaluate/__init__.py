"""Model evaluation: loss on reference answers, and recall of the model's own answers."""

from easyllm.evaluate.answers import Answer, AnswerReport, evaluate_answers, key_in_text

__all__ = ["Answer", "AnswerReport", "evaluate_answers", "key_in_text"]
