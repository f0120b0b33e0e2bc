"""Personal data: what each kind matches and does not match, and linear time for any text."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.corpus.privacy import (
    PLACEHOLDERS,
    Finding,
    PrivacyConfig,
    find,
    is_bank_card,
    is_resident_id,
    redact,
)

FOUND = {
    "email": [
        "li.hua+news@mail.example.com",
        "A_B-c%d@x-y.co.uk",
        "1@sub.museum",
        "x" * 64 + "@example.com",
    ],
    "ip_address": [
        *("8.8.8.8", "203.0.114.255", "1.1.1.1"),
        *("2001:4860:4860::8888", "2606:4700:4700:0:0:0:0:1111", "240e::"),
    ],
    "phone": [
        *("13800138000", "19912345678", "14012345678", "16612345678", "17800000000"),
        *("+8613800138000", "+86 138 0013 8000", "0086-13800138000", "138-0013-8000"),
    ],
    "resident_id": ["11010519491231002X", "11010519491231002x", "440524188001010014"],
    "bank_card": [
        *("4111111111111111", "5555555555554444", "378282246310005", "6011111111111117"),
        *("30569309025904", "3530111333300000", "2223003122003222", "4222222222222"),
        *("4111 1111 1111 1111", "4111-1111-1111-1111", "3782 822463 10005"),
        *("6212345678901265", "6228480402564890018"),
    ],
}
LEFT = {
    "email": [
        *("icon@2x.png", "user@localhost", "@decorator.name", "a@b", "x@-y.com", "x@y..com"),
        *("x" * 65 + "@example.com", "see you @ example.com", "a@b.c1"),
    ],
    "ip_address": [
        *("10.0.0.1", "192.168.1.1", "172.16.0.1", "127.0.0.1", "169.254.1.1", "0.0.0.0"),
        *("100.64.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255", "256.1.1.1", "01.2.3.4"),
        *("v1.2.3.4", "1.2.3.4.5", "1.2.3", "8.8.8.8a", "8.8.8.8888"),
        *("::1", "fe80::1", "fd00::1", "2001:db8::1", "ff02::1", "dead::beef", "std::cout"),
        *("12:30:45", "2001:12:31", "2001:4860:4860:::8888", "00:1B:44:11:3A:B7"),
    ],
    "phone": [
        *("12800138000", "1380013800", "138001380001", "213800138000", "15412345678"),
        *("3.14159265358", "13800138000.25", "138-00138-000", "138-0013 8000", "8613800138000"),
    ],
    "resident_id": [
        *("110105194912310021", "11010519491331002X", "11010519490231002X", "1101051949123100"),
        *("111010519491231002X", "11010519491231002X0", "99010519491231002X"),
    ],
    "bank_card": [
        *("4111111111111112", "41111111111111111", "1234567812345670", "04111111111111111"),
        *("411111111111111111111", "0.4111111111111111", "4111 1111-1111 1111", "0000000000000000"),
        *("4111  1111 1111 1111", "411111111111"),
    ],
}
SURROUNDINGS = ["{}", "write: {}, or", "请联系{}。谢谢", "({})", "\n{}\n", "“{}”", "是{}吗"]


def only(kind):
    return PrivacyConfig(kinds=(kind,))


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("kind", FOUND)
def test_each_format_is_replaced_and_the_surrounding_text_stays(kind, surrounding):
    for written in FOUND[kind]:
        text, counts = redact(surrounding.format(written), only(kind))
        assert text == surrounding.format(PLACEHOLDERS[kind]), written
        assert counts == {kind: 1}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("kind", LEFT)
def test_lookalikes_are_left_unchanged(kind, surrounding):
    for written in LEFT[kind]:
        text = surrounding.format(written)
        assert redact(text, only(kind)) == (text, Counter()), written


def test_ports_prefix_lengths_and_mapped_addresses_are_recognised():
    assert redact("[2606:4700:4700::1111]:443 8.8.8.8:53 8.8.4.4/24.", PrivacyConfig())[0] == (
        "[<IP_ADDRESS>]:443 <IP_ADDRESS>:53 <IP_ADDRESS>/24."
    )
    assert redact("at 2606:4700:4700::1111: yes", PrivacyConfig())[0] == "at <IP_ADDRESS>: yes"
    assert redact("::ffff:8.8.8.8", PrivacyConfig())[0] == "::ffff:<IP_ADDRESS>"


def test_a_card_number_is_found_next_to_other_numbers():
    config = only("bank_card")
    assert redact("no. 12 4111 1111 1111 1111 123 Main St", config)[0] == (
        "no. 12 <BANK_CARD> 123 Main St"
    )
    assert redact("2024 4111 1111 1111 1111", config)[0] == "2024 <BANK_CARD>"
    assert redact("6228 4804 0256 4890 018", config)[0] == "<BANK_CARD>"


def test_overlapping_matches_are_merged():
    assert redact("13800138000@example.com", PrivacyConfig())[0] == "<EMAIL>"
    both = next(
        n
        for tail in range(10000)
        for n in [f"62010219800101{tail:04}"]
        if is_resident_id(n) and is_bank_card(n)
    )
    assert redact(both, PrivacyConfig())[1] == {"resident_id": 1}
    assert redact(both, only("bank_card"))[1] == {"bank_card": 1}
    assert redact("13800138000@example.com", only("phone"))[0] == "<PHONE>@example.com"


def test_findings_contain_their_location():
    text = "a@example.com 和 13800138000"
    assert find(text, PrivacyConfig()) == [Finding("email", 0, 13), Finding("phone", 16, 27)]


def test_kinds_mode_and_placeholders_are_configurable():
    text = "a@example.com 8.8.8.8 13800138000"
    assert redact(text, PrivacyConfig(kinds=())) == (text, Counter())
    counts = {"email": 1, "ip_address": 1, "phone": 1}
    assert redact(text, PrivacyConfig(mode="count")) == (text, counts)
    config = validate(
        PrivacyConfig,
        {"kinds": ["email", "phone"], "placeholders": {"email": "[邮箱]"}},
        source="r",
    )
    assert redact(text, config) == ("[邮箱] 8.8.8.8 <PHONE>", {"email": 1, "phone": 1})
    with pytest.raises(ConfigError, match="kinds"):
        validate(PrivacyConfig, {"kinds": ["emails"]}, source="r")


@pytest.mark.parametrize("number", FOUND["resident_id"])
def test_every_wrong_character_or_swap_invalidates_a_resident_id(number):
    for place in range(18):
        for other in "0123456789X"[: 11 if place == 17 else 10]:
            changed = number[:place] + other + number[place + 1 :]
            assert is_resident_id(changed) == (changed.upper() == number.upper())
    for place in range(16):
        swapped = number[:place] + number[place + 1] + number[place] + number[place + 2 :]
        assert is_resident_id(swapped) == (swapped == number)


def test_every_wrong_digit_invalidates_a_card_number():
    for number in ("4111111111111111", "378282246310005", "6228480402564890018"):
        assert is_bank_card(number)
        for place in range(len(number)):
            for other in set("0123456789") - {number[place]}:
                assert not is_bank_card(number[:place] + other + number[place + 1 :])


PIECES = st.sampled_from(
    [x for kind in FOUND for x in FOUND[kind]] + [*"a1@.:- +X", "联系", "\n", "86", "2001:", "0."]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@settings(deadline=None, max_examples=300)
def test_findings_are_disjoint_and_ordered_and_the_rest_stays(text):
    findings = find(text, PrivacyConfig())
    ends = [0, *(f.end for f in findings)]
    assert all(end <= f.start < f.end for end, f in zip(ends, findings, strict=False))
    expected = list(text)
    for finding in reversed(findings):
        expected[finding.start : finding.end] = [PLACEHOLDERS[finding.kind]]
    assert redact(text, PrivacyConfig())[0] == "".join(expected)


HOSTILE_CODE = """
from easyllm.corpus.privacy import PrivacyConfig, find
pieces = [
    *("a", "@", "a@", "a.", "a-", "x@a.", "1", "1 ", "1.", "4111 ", "4111-1111-1111-1112-"),
    *("13812345678 ", "138-", "+86", "0086", ":", "2001:", "2001::", "62", "11010519491231002"),
    *("8.8.8.", "x@" + "a" * 63 + "."),
]
for piece in pieces:
    find("x@2001:" + piece * (1_000_000 // len(piece)), PrivacyConfig())
"""


def test_no_pattern_is_slow_on_a_text_of_a_million_characters():
    subprocess.run([sys.executable, "-c", HOSTILE_CODE], check=True, timeout=300)
