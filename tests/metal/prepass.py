"""prepass.py - turns a .metal file into C++ that clang compiles behind shim/metal_stdlib; lines stay where they are.

    kernel signature             -> stays, its [[attributes]] go; they become the arguments of an entry function
    template [[host_name("x")]]  -> an entry function without parameters, registered under x
    constant T x [[function_constant(N)]];  -> a global that the runner sets, registered under N
    #include "y"                 -> stays; clang finds our headers by -I

An attribute, a parameter or threadgroup memory that is not understood is an error: nothing is dropped silently.
SPDX-License-Identifier: MIT
"""

import re
import sys
from pathlib import Path

BUILTIN = {
    "threadgroup_position_in_grid": "msl_current.group",
    "thread_position_in_threadgroup": "msl_current.thread_in_group",
    "threads_per_threadgroup": "msl_current.threads",
    "thread_index_in_threadgroup": "msl_current.thread_index",
    "thread_index_in_simdgroup": "msl_current.lane",
    "simdgroup_index_in_threadgroup": "msl_current.simdgroup",
    "simdgroups_per_threadgroup": "msl_current.threads.x/32",
}
CONSTANT = re.compile(r"constant\s+(\w+)\s+(\w+)\s*\[\[function_constant\((\w+)\)\]\]\s*;")
KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
INSTANCE = re.compile(r"template\s*\[\[host_name\(\"(\w+)\"\)\]\]\s*kernel\s+\w+\s+(\w+<[^;>]*>)\s*;")
PARAMETER = re.compile(r"^(?P<type>.*?)(?P<name>\w+)\s*\[\[(?P<attribute>\w+)(?:\((?P<slot>\w+)\))?\]\]$", re.DOTALL)
STATIC_MEMORY = re.compile(r"^\s+threadgroup\s+\w+\s+\w+\s*\[", re.MULTILINE)


class Refused(Exception):
    pass


def split(text: str) -> "list[str]":
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([<") - (c in ")]>")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def argument(parameter: str) -> str:
    """The expression that an entry function passes for one parameter of a kernel."""
    found = PARAMETER.match(parameter)
    if not found:
        raise Refused(f"parameter '{parameter}' has no attribute that says where it comes from")
    kind, slot, attribute = " ".join(found["type"].split()), found["slot"], found["attribute"]
    if attribute == "buffer" and kind.endswith("&"):
        return f"*({kind[:-1]}*) msl_current.buffer[{slot}]"
    if attribute == "buffer" and kind.endswith("*"):
        return f"({kind}) msl_current.buffer[{slot}]"
    if attribute == "threadgroup" and kind.endswith("*") and slot == "0":
        return f"({kind}) msl_current.memory"
    if attribute in BUILTIN and slot is None:
        return BUILTIN[attribute]
    raise Refused(f"parameter '{parameter}': [[{attribute}]] is unknown here")


def signature(text: str, start: int) -> "tuple[int, list[str]]":
    """Position of the closing bracket of the parameter list that opens at start, and the parameters."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i, split(text[start + 1:i])
    raise Refused("a parameter list does not end")


def spelled_out(text: str) -> str:
    """Kernels whose parameter list is the name of a macro of this file, with the list itself instead."""
    macros = {}

    def forget(found: "re.Match") -> str:
        macros[found[1]] = " ".join(found[2].replace("\\\n", " ").split())
        return "\n" * found[2].count("\n") if "[[" in found[2] else found[0]

    text = re.sub(r"^#define (\w+) ((?:.*\\\n)*.*)$", forget, text, flags=re.MULTILINE)
    return re.sub(r"(kernel void \w+\()(\w+)\)", lambda found: f"{found[1]}{macros[found[2]]})", text)


def register(host_name: str, function: str, arguments: "list[str]") -> str:
    return (f"static void entry_{host_name}() {{ {function}({', '.join(arguments)}); }} static const int "
            f"added_{host_name} = (msl_add_kernel(\"{host_name}\", entry_{host_name}), 0);")


def uncommented(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def translate(text: str) -> str:
    text = spelled_out(uncommented(text))
    if STATIC_MEMORY.search(text):
        raise Refused("threadgroup arrays inside a kernel are not supported: take the memory as [[threadgroup(0)]]")
    kernels, out, at = {}, "", 0
    for found in KERNEL.finditer(text):
        end, parameters = signature(text, found.end() - 1)
        kernels[found[1]] = [argument(parameter) for parameter in parameters]
        out += text[at:found.end()] + re.sub(r"\[\[[^\]]*\]\]", "", text[found.end():end])
        at = end
    out += text[at:]
    is_template = {name for name in kernels if re.search(r"template\s*<[^>]*>\s*kernel\s+void\s+" + name + r"\b", text)}
    out = CONSTANT.sub(r"static \1 \2; static const int added_\2 = (msl_add_constant(\3, &\2), 0);", out)
    out = INSTANCE.sub(lambda m: register(m[1], m[2], kernels[m[2].split("<")[0]]), out)
    out = re.sub(r"^#pragma clang loop [^\n]*", "", out, flags=re.MULTILINE)
    if "[[" in out:
        raise Refused(f"unknown attribute: {out[out.index('[['):][:60]}")
    return out + "".join("\n" + register(name, name, kernels[name]) for name in kernels if name not in is_template) + "\n"


def main() -> int:
    source = Path(sys.argv[1])
    try:
        text = translate(source.read_text())
    except Refused as refused:
        print(f"{source}: {refused}", file=sys.stderr)
        return 1
    Path(sys.argv[2]).write_text(f"#line 1 \"{source}\"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
