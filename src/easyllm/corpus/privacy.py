"""Detection and redaction of personal data (PII): patterns, verified by checksums or ranges.

Kinds: e-mail addresses, public IP addresses, Chinese mobile numbers, Chinese resident identity
numbers, bank card numbers. Every pattern has a bounded length and is anchored at the start of a run
of characters, so that the time is linear in the length of any text. Full-width digits and letters
should be converted (NFKC) beforehand.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal

from pydantic import Field

from easyllm.core.config import Config

Kind = Literal["email", "ip_address", "resident_id", "bank_card", "phone"]
PLACEHOLDERS: dict[Kind, str] = {
    "email": "<EMAIL>",
    "ip_address": "<IP_ADDRESS>",
    "resident_id": "<RESIDENT_ID>",
    "bank_card": "<BANK_CARD>",
    "phone": "<PHONE>",
}


class PrivacyConfig(Config):
    """Which personal data to detect, and how to handle it."""

    kinds: tuple[Kind, ...] = Field(
        tuple(PLACEHOLDERS), description="Kinds of personal data to detect."
    )
    mode: Literal["replace", "count"] = Field(
        "replace",
        description="`replace` replaces each finding by a placeholder, `count` leaves the text "
        "unchanged.",
    )
    placeholders: dict[Kind, str] = Field(
        default_factory=dict,
        description="Placeholders by kind, instead of the default ones such as `<EMAIL>`.",
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of personal data, `text[start:end]`."""

    kind: Kind
    start: int
    end: int


def redact(text: str, config: PrivacyConfig) -> tuple[str, Counter[str]]:
    """Returns the text with every finding replaced, and the number of findings of each kind.

    >>> redact("写信给 li.hua@example.com 或电 13800138000", PrivacyConfig())
    ('写信给 <EMAIL> 或电 <PHONE>', Counter({'email': 1, 'phone': 1}))
    """
    findings = find(text, config)
    counts = Counter[str](finding.kind for finding in findings)
    if config.mode == "count" or not findings:
        return text, counts
    pieces, done = [], 0
    for finding in findings:
        placeholder = config.placeholders.get(finding.kind, PLACEHOLDERS[finding.kind])
        pieces += [text[done : finding.start], placeholder]
        done = finding.end
    return "".join([*pieces, text[done:]]), counts


def find(text: str, config: PrivacyConfig) -> list[Finding]:
    """Returns the findings in order, without overlaps.

    Of overlapping findings, the one that starts first is kept; of those, the longest.
    """
    found = [
        Finding(kind, *span)
        for kind, finder in _FINDERS.items()  # in order of precedence for equal spans
        if kind in config.kinds
        for span in finder(text)
    ]
    found.sort(key=lambda finding: (finding.start, -finding.end))
    separate: list[Finding] = []
    for finding in found:
        if not separate or finding.start >= separate[-1].end:
            separate.append(finding)
    return separate


# ---- e-mail

_DOMAIN = re.compile(
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-"
_MAX_LOCAL = 64
"""RFC 5321, section 4.5.3.1."""
_IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "avif"})
"""`icon@2x.png` is an image file for high-density screens, not an address."""


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _DOMAIN.finditer(text):
        before = text[max(match.start() - _MAX_LOCAL - 1, 0) : match.start()]
        length = len(before) - len(before.rstrip(_LOCAL))
        if 0 < length <= _MAX_LOCAL and match[1].lower() not in _IMAGE_SUFFIXES:
            yield match.start() - length, match.end()


# ---- IP addresses

_IPV4 = re.compile(
    r"[0-9](?<![A-Za-z0-9_.][0-9])[0-9]{0,2}\."  # not part of v1.2.3.4 or 1.2.3.4.5
    r"(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![A-Za-z0-9_]|\.[0-9])"
)
_IPV6 = re.compile(
    r"[23](?<![A-Za-z0-9_:.].)[0-9A-Fa-f]{3}:"
    r"(?:[0-9A-Fa-f]{0,4}:){1,7}(?:[0-9A-Fa-f]{1,4}|(?<=::))(?![A-Za-z0-9_]|:[A-Za-z0-9:])"
)
"""Addresses in 2000::/3, the only global unicast block that is assigned (RFC 4291, section 2.4), so
that text such as `dead::beef` does not match."""


def _ip_addresses(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        if _is_public_ipv4(match[0]):
            yield match.span()
    for match in _IPV6.finditer(text):
        if _is_public_ipv6(match[0]):
            yield match.span()


def _is_public_ipv4(written: str) -> bool:
    try:
        address = IPv4Address(written)
    except AddressValueError:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_public_ipv6(written: str) -> bool:
    try:
        address = IPv6Address(written)
    except AddressValueError:
        return False
    return address.is_global


# ---- numbers

_RESIDENT_ID = re.compile(
    r"[1-9](?<![0-9][0-9])[0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])[0-3][0-9]"
    r"[0-9]{3}[0-9Xx](?![0-9])"
)
_PROVINCES = frozenset(
    [
        *range(11, 16),
        *range(21, 24),
        *range(31, 38),
        *range(41, 47),
        *range(50, 55),
        *range(61, 66),
        *(71, 81, 82, 83, 91),
    ]
)


def _resident_ids(text: str) -> Iterator[tuple[int, int]]:
    for match in _RESIDENT_ID.finditer(text):
        if is_resident_id(match[0]):
            yield match.span()


def is_resident_id(number: str) -> bool:
    """Returns whether 18 characters are a valid Chinese resident identity number (GB 11643-1999).

    Checks the province, the date of birth, and the check character of ISO 7064 MOD 11-2:
    Σ aᵢ 2^(18-i) ≡ 1 modulo 11, where X means 10.

    >>> is_resident_id("11010519491231002X"), is_resident_id("110105194912310021")
    (True, False)
    """
    if len(number) != 18 or int(number[:2]) not in _PROVINCES or not _is_date(number[6:14]):
        return False
    values = [10 if digit in "Xx" else int(digit) for digit in number]
    return sum(value << (17 - place) for place, value in enumerate(values)) % 11 == 1


def _is_date(digits: str) -> bool:
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return True


_BANK_CARD = re.compile(
    r"[2-9](?<![0-9][0-9])(?<![0-9]\.[0-9])(?:"  # not part of a longer number, not decimals
    r"[0-9]{12,18}"
    r"|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?P<rest>\1[0-9]{1,3}(?![0-9]))?"
    r"|[0-9]{3}([ -])[0-9]{6}\3[0-9]{4,5}"  # 4-6-4 (Diners), 4-6-5 (American Express)
    r")(?![0-9])"
)
_ISSUERS: tuple[tuple[int, int, int, frozenset[int]], ...] = (
    # (number of digits of the prefix, its first and last value, valid lengths of the number), from
    # ISO/IEC 7812 and the ranges published by the issuers
    (1, 4, 4, frozenset({13, 16, 19})),  # Visa
    (2, 51, 55, frozenset({16})),  # Mastercard
    (4, 2221, 2720, frozenset({16})),  # Mastercard
    (2, 34, 34, frozenset({15})),  # American Express
    (2, 37, 37, frozenset({15})),
    (2, 62, 62, frozenset({16, 17, 18, 19})),  # UnionPay
    (2, 81, 81, frozenset({16, 17, 18, 19})),
    (4, 9558, 9558, frozenset({19})),  # ICBC, older cards
    (4, 3528, 3589, frozenset({16, 17, 18, 19})),  # JCB
    (4, 6011, 6011, frozenset({16, 17, 18, 19})),  # Discover
    (3, 644, 659, frozenset({16, 17, 18, 19})),
    (3, 300, 305, frozenset({14, 16, 17, 18, 19})),  # Diners Club
    (2, 36, 36, frozenset({14, 15, 16, 17, 18, 19})),
    (2, 38, 39, frozenset({16, 17, 18, 19})),
)


def _bank_cards(text: str) -> Iterator[tuple[int, int]]:
    position = 0
    while match := _BANK_CARD.search(text, position):
        # If this is not a card number, one may start at a later group of digits
        position = match.start() + 1
        for end in (match.end(), match.start("rest")):
            if end > 0 and is_bank_card(re.sub("[ -]", "", text[match.start() : end])):
                yield match.start(), end
                position = end
                break


def is_bank_card(number: str) -> bool:
    """Returns whether digits have an issuer's prefix and length and a valid Luhn check digit.

    The check digit is defined in ISO/IEC 7812-1, annex B.

    >>> is_bank_card("4111111111111111"), is_bank_card("4111111111111112")
    (True, False)
    """
    known = any(
        len(number) in lengths and first <= int(number[:digits]) <= last
        for digits, first, last, lengths in _ISSUERS
    )
    return known and luhn_sum(number) % 10 == 0


def luhn_sum(number: str) -> int:
    """Returns the Luhn sum of a number: a valid number has a sum divisible by 10.

    Counting from the rightmost digit, every second digit is doubled and replaced by the sum of the
    digits of the result.
    """
    plain = sum(int(digit) for digit in number[::-2])
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return plain + doubled


_PHONE = re.compile(
    r"1(?:3[0-9]|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])"
    r"(?:[0-9]{8}|([ -])[0-9]{4}\1[0-9]{4})(?!\.?[0-9])"
)
"""The prefixes assigned to the four network operators and their resellers, then 8 more digits."""
_COUNTRY = re.compile(r"(?:\+|(?<![0-9])00)86[ -]?\Z")
_DIGIT_BEFORE = re.compile(r"[0-9]\.?\Z")
"""The number is part of a longer one, or the decimals of one (3.14159265358)."""


def _phones(text: str) -> Iterator[tuple[int, int]]:
    position = 0
    while match := _PHONE.search(text, position):
        start, position = match.start(), match.start() + 1
        before = text[max(start - 6, 0) : start]
        country = _COUNTRY.search(before)
        if country is None and _DIGIT_BEFORE.search(before):
            continue
        position = match.end()
        yield start - len(country[0] if country else ""), position


_FINDERS: dict[Kind, Callable[[str], Iterator[tuple[int, int]]]] = {
    "email": _emails,
    "ip_address": _ip_addresses,
    "resident_id": _resident_ids,
    "bank_card": _bank_cards,
    "phone": _phones,
}
