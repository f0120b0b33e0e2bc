"""Ids of tool calls for chat templates that accept only nine letters or digits (Mistral's)."""

import hashlib
import re
from collections.abc import Sequence

from easyllm.core.json_types import Json, JsonObject

_SHORT = re.compile(r"[a-zA-Z0-9]{9}")


def with_short_ids(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Returns messages in which each id of a call has nine letters or digits.

    Equal ids get equal short ones, so that results still name their calls.
    """
    found = list[JsonObject]()
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in changed:
            changed["tool_call_id"] = _short(changed["tool_call_id"])
        if isinstance(changed.get("tool_calls"), list):
            changed["tool_calls"] = [_with_short_id(call) for call in changed["tool_calls"]]
        found.append(changed)
    return found


def _with_short_id(call: Json) -> Json:
    return {**call, "id": _short(call.get("id"))} if isinstance(call, dict) else call


def _short(identity: Json) -> str:
    if isinstance(identity, str) and _SHORT.fullmatch(identity):
        return identity
    return hashlib.sha256(str(identity).encode("utf-8", "replace")).hexdigest()[:9]
