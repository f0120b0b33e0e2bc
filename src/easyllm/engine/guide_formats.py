"""Regular expressions of the `format`s of JSON Schema that a guide enforces.

Each matches a subset of what the named RFC defines: days exist in their year, seconds have no leap
second and at most six decimals, T and Z are capital letters, so that Python's `datetime` reads
every result.
"""

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # 0001 to 9999
_BY_FOUR = "(?:0[48]|[2468][048]|[13579][26])"  # two digits divisible by four, except 00
_LEAP_YEAR = f"(?:[0-9]{{2}}{_BY_FOUR}|{_BY_FOUR}00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_NUMBER = "[0-9]{1,4}"
_CLOCK = f"T(?:{_NUMBER}H(?:{_NUMBER}M(?:{_NUMBER}S)?)?|{_NUMBER}M(?:{_NUMBER}S)?|{_NUMBER}S)"
_CALENDAR = f"(?:{_NUMBER}Y(?:{_NUMBER}M(?:{_NUMBER}D)?)?|{_NUMBER}M(?:{_NUMBER}D)?|{_NUMBER}D)"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = "[0-9a-fA-F]{1,4}"
_HEX = "[0-9a-fA-F]"
_URI_CHARACTER = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_HOST = f"{_LABEL}(?:\\.{_LABEL})*"
_PATH = f"(?:/{_URI_CHARACTER}*)*"
_HIERARCHY = f"(?://{_HOST}(?::[0-9]{{1,5}})?{_PATH}|{_URI_CHARACTER}+{_PATH})"
_QUERY = f"(?:\\?(?:{_URI_CHARACTER}|[/?])*)?(?:#(?:{_URI_CHARACTER}|[/?])*)?"


def _ipv6() -> str:
    """Returns eight groups, or fewer groups around one `::`."""
    some = [f"(?:{_GROUP}(?::{_GROUP}){{0,{most - 1}}})?" for most in range(1, 7)]
    short = [f"{before}::{after}" for before, after in zip(some, reversed(some), strict=True)]
    return "|".join([f"(?:{_GROUP}:){{7}}{_GROUP}", *short])


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_CALENDAR}(?:{_CLOCK})?|{_CLOCK}|{_NUMBER}W)",
    "email": f"{_ATOM}(?:\\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": f"(?:{_BYTE}\\.){{3}}{_BYTE}",
    "ipv6": _ipv6(),
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "uri": f"[a-zA-Z][a-zA-Z0-9+.-]*:{_HIERARCHY}{_QUERY}",
}
"""A regular expression for each format; a text has the format if it matches as a whole."""
MAX_LENGTHS = {"email": 254, "hostname": 253}
"""Maximum number of characters, for the formats that have one."""
