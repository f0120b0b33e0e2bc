"""The reader of answers: numbers, choices, code, reasoning."""

import pytest

from easyllm.prompt.extract import code_of, extract, numbers, same_number, without_reasoning


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 48/2 = 24, and 48+24 = 72.\n#### 72", "72"),
        ("#### $1,250.50", "1250.50"),
        (r"Thus \boxed{-3}. Check: 5 + -8 = -3, 12 steps", "-3"),
        ("The answer is 18 dollars, since 3 * 6 = 18 and 2 more are free.", "18"),
        ("First the answer is 5. No: the answer is 6 (not 7).", "6"),
        ("所以答案是４２个苹果，每人3个", "42"),
        ("结果：−7", "-7"),
        ("10-3 makes 7", "7"),
        ("9 - 4", "4"),
        ("the answer is unknown, maybe 3 or 4", "3"),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert extract("number", text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (C) because of gravity", "C"),
        ("D. Paris", "D"),
        ("**A**", "A"),
        ("The answer is (B).", "B"),
        ("The correct answer is option C", "C"),
        ("答案：（Ｂ）", "B"),
        ("我选择 D。", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("Answer: A, no, the answer is B", "B"),
        ("Because (A) and (C) are wrong", None),
        ("It must be (B), I think", "B"),
        ("A dog barks", None),
        ("Answer: Apples", None),
        ("The answer is a dog", None),
        ("E", None),
    ],
)
def test_the_letter_of_a_choice(text, letter):
    assert extract("choice", text) == letter


def test_letters_beyond_the_choices_are_not_read():
    assert extract("choice", "E", num_choices=5) == "E"
    assert extract("choice", "The answer is C", num_choices=2) is None


def test_the_last_block_of_code_is_read_and_indentation_kept():
    assert code_of("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert extract("code", "    return 1\n") == "    return 1\n"


def test_lines_and_text():
    assert extract("line", "\n  Paris \nIt is in France") == "Paris"
    assert extract("text", " \n") is None


def test_signs_separators_and_full_width_digits_of_numbers():
    assert numbers("1,234 and 1,2,3 and x-5 and (-5) and ３．５") == [
        *("1234", "1", "2", "3", "5", "-5", "3.5"),
    ]
    assert same_number("-5", "-5.0")
    assert not same_number("-5", "5")
    assert not same_number("3.5", "35")
    assert not same_number("5 or 6", "5")


def test_reasoning_that_has_not_ended_leaves_no_answer():
    assert without_reasoning("2 or 3? </think>3", opened=True) == "3"
    assert without_reasoning("2 or 3?", opened=True) is None
    assert without_reasoning("plain") == "plain"
