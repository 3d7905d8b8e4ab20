"""Names of cache types: "kvarn", "kvarn2", "kvarn4/kvarn2", "q8_0", ... -> one name for keys, one for values.

SPDX-License-Identifier: MIT
"""

# what llama.cpp takes as a cache type, ours first
NAMES = ("kvarn2", "kvarn3", "kvarn4", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

# "kvarn" is the setting the method's authors ship; the longer name is theirs
PRESETS = {"kvarn": "kvarn4/kvarn2", "kvarn_k4v2_g128": "kvarn4/kvarn2"}

UNQUANTIZED = ("f16", "bf16", "f32")


def parse(kv_type: str) -> "tuple[str, str]":
    """(name for keys, name for values). ValueError with the list of names if one is unknown."""
    if not isinstance(kv_type, str):
        raise ValueError(f"kv_type is a name, not {kv_type!r}; for ids use type_k and type_v")
    text = PRESETS.get(kv_type.strip().lower(), kv_type.strip().lower())
    keys, slash, values = text.partition("/")
    values = values if slash else keys
    for name in (keys, values):
        if name not in NAMES:
            raise ValueError(f"unknown kv_type '{kv_type}': use kvarn (= kvarn4/kvarn2), one of {', '.join(NAMES)}, "
                             "or two of them as KEYS/VALUES")
    return keys, values


def listed(text: str) -> "list[str]":
    """The kv_types of a list with commas, as they are written there."""
    return [name.strip() for name in text.split(",") if name.strip()]


def is_kvarn(*names: "str | None") -> bool:
    """True if any of these types is stored in tiles."""
    return any(name is not None and name.startswith("kvarn") for name in names)


def is_quantized(name: "str | None") -> bool:
    """True if a type needs flash attention for values."""
    return name is not None and name not in UNQUANTIZED


def label(keys: str, values: str) -> str:
    """How a pair is written: "kvarn4/kvarn2", or one name where both are the same."""
    return keys if keys == values else f"{keys}/{values}"
