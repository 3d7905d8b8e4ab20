"""kvarn doctor: which libraries, devices and kernels are in use, what is missing, and what makes it slow.

Looks, and changes nothing. Every finding says what to do about it. SPDX-License-Identifier: MIT
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import kvarn

from . import library
from .upstream import Failure, read_pin, source_dir

EXAMPLE = """examples:
  kvarn doctor            one screen, problems last
  kvarn doctor --json     for a script, or for a bug report

exit status: 0 works (perhaps slowly), 1 something is broken
"""
PACKAGES = {"numpy": "kvarn.codec, the server", "gguf": "kvarn plan", "rich": "tables", "matplotlib": "plots",
            "fastapi": "kvarn serve --python", "uvicorn": "kvarn serve --python"}
DEVICE_TYPES = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}
FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "asimd", "asimddp", "i8mm")
FOR_TESTS = ("KVARN_STRICT", "KVARN_TEST_EXACT")


class Finding(NamedTuple):
    level: str      # "broken", "slow" or "note"
    what: str
    do: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


# --- looking ---


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def processor() -> "dict[str, Any]":
    info = read_text("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info)
    listed = re.search(r"^(?:flags|Features)\s*: (.*)", info, re.M)
    flags = set(listed.group(1).split() if listed else ())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"name": name.group(1) if name else platform.processor() or platform.machine(), "machine": platform.machine(),
            "cores": os.cpu_count() or 1, "usable_cores": usable, "quota_cores": quota(), "load": load_average(),
            "has": sorted(flags & set(FEATURES))}


def quota() -> "float | None":
    """Cores that a container may use, None: all."""
    limit = read_text("/sys/fs/cgroup/cpu.max").split()
    return int(limit[0])/int(limit[1]) if len(limit) == 2 and limit[0].isdigit() else None


def load_average() -> "float | None":
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory() -> "tuple[int, int]":
    """(available, total) bytes of main memory; zeros where nobody says."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo"), re.M))
    return int(found.get("MemAvailable", 0)) << 10, int(found.get("MemTotal", 0)) << 10


class Symbol(ctypes.Structure):
    """Dl_info of dladdr()."""

    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def cpu_library(folder: Path) -> Path:
    """The library of the CPU backend in use; ImportError if there is none that this processor can run."""
    handle, base = library.load_backends(folder), ctypes.CDLL(str(library.library_file(folder, "ggml-base")))
    handle.ggml_backend_reg_by_name.argtypes, handle.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    find, found = base.ggml_backend_reg_get_proc_address, Symbol()
    find.argtypes, find.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    backend = handle.ggml_backend_reg_by_name(b"CPU")
    function = find(backend, b"ggml_backend_set_n_threads") if backend else None
    if not function or not ctypes.CDLL(None).dladdr(ctypes.c_void_p(function), ctypes.byref(found)) or not found.file:
        raise ImportError(f"{folder} has no CPU backend that this processor can run; install kvarn again, or build it here")
    return Path(found.file.decode())


def devices(folder: Path) -> "list[dict[str, Any]]":
    """What the library can compute on."""
    handle = library.load_backends(folder)
    handle.ggml_backend_dev_count.restype = ctypes.c_size_t
    handle.ggml_backend_dev_get.argtypes, handle.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    base = ctypes.CDLL(str(library.library_file(folder, "ggml-base")))
    for name in ("name", "description"):
        function = getattr(base, f"ggml_backend_dev_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    found = []
    for number in range(handle.ggml_backend_dev_count()):
        device = handle.ggml_backend_dev_get(number)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = DEVICE_TYPES.get(base.ggml_backend_dev_type(device), "other")
        found.append({"name": base.ggml_backend_dev_name(device).decode(errors="replace"), "type": kind, "free": free.value,
                      "description": base.ggml_backend_dev_description(device).decode(errors="replace"), "total": total.value})
    return found


def kernels(cpu: Path) -> "dict[str, str]":
    """Names of the attention kernels: in use, and the best of this processor; "" where KVARN_CPU names none it has."""
    handle = ctypes.CDLL(str(cpu))
    handle.kvarn_cpu_find.argtypes, handle.kvarn_cpu_find.restype = [ctypes.c_char_p], ctypes.POINTER(ctypes.c_char_p)

    def name(wanted: "str | None") -> str:
        found = handle.kvarn_cpu_find(wanted.encode() if wanted else None)
        return str(found[0].decode()) if found else ""

    return {"in_use": name(os.environ.get("KVARN_CPU")), "best": name(None)}


def examine() -> "dict[str, Any]":
    """Everything there is to say; findings last."""
    report: "dict[str, Any]" = {"kvarn": kvarn.__version__, "python": platform.python_version(), "platform": platform.platform(),
                                "executable": sys.executable, "processor": processor(),
                                "packages": {name: version_of(name) for name in ("llama-cpp-python", *PACKAGES)}}
    available, total = memory()
    report["memory"] = {"available": available, "total": total}
    findings: "list[Finding]" = []
    try:
        report["wanted_llama_cpp_python"] = read_pin(source_dir()).version
        if library.bundled_binding() is not None:
            report["packages"]["llama-cpp-python"] = report["packages"]["llama-cpp-python"] or report["wanted_llama_cpp_python"]
    except Failure as failure:
        findings.append(Finding("broken", str(failure), "install kvarn again"))
    try:
        folder = library.lib_path()
        found = library.probe(folder)
        files = [path for path in folder.iterdir() if path.suffix in (".so", ".dylib", ".dll")]
        report["libraries"] = {"folder": str(folder), "bytes": sum(path.stat().st_size for path in files),
                               "format_version": found.format_version, "cache_types": [name for name in library.NAMES],
                               "backends": sorted(path.stem.split("ggml-")[1] for path in files
                                                  if "ggml-" in path.stem and "base" not in path.stem)}
        report["devices"] = devices(folder)
        cpu = cpu_library(folder)
        report["libraries"]["cpu"] = cpu.stem.split("ggml-")[1]
        report["kernels"] = kernels(cpu)
    except (ImportError, OSError, AttributeError) as error:
        findings.append(Finding("broken", str(error), ""))
    findings += judge(report)
    report["findings"] = [finding._asdict() for finding in findings]
    return report


# --- judging ---


def judge(report: "dict[str, Any]") -> "list[Finding]":
    findings: "list[Finding]" = []

    def add(level: str, what: str, do: str) -> None:
        findings.append(Finding(level, what, do))

    cpu, wanted, found = report["processor"], report.get("wanted_llama_cpp_python"), report["packages"]["llama-cpp-python"]
    if not found:
        add("note", "llama-cpp-python is not installed: the tools work, kvarn.Llama, chat, run, demo, bench and eval do not",
            f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={wanted}")
    elif wanted and found != wanted:
        add("broken", f"llama-cpp-python is {found}; its structs must match the libraries, which are those of {wanted}",
            f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={wanted}")
    for name in ("gguf", "rich"):
        if not report["packages"][name]:
            add("note", f"{name} is not installed: it is for {PACKAGES[name]}", f"pip install {name}")
    for name in FOR_TESTS:
        if os.environ.get(name, "0") not in ("", "0"):
            add("note", f"{name} is set: it is for tests, and makes the cache larger or less exact", f"unset {name}")
    theirs = os.environ.get("LLAMA_CPP_LIB_PATH")
    if theirs and "libraries" in report and Path(theirs).resolve() != Path(report["libraries"]["folder"]).resolve():
        add("note", f"LLAMA_CPP_LIB_PATH points to {theirs}: a program that does not import kvarn first uses those libraries",
            "eval \"$(kvarn env)\"")
    if "kernels" in report:
        findings.extend(judge_speed(report))
    load, usable = cpu["load"], min(cpu["usable_cores"], cpu["quota_cores"] or cpu["usable_cores"])
    if load is not None and load > 0.5*cpu["cores"]:
        add("slow", f"programs ask for {load:.1f} of {cpu['cores']} cores (load average)", "run it when the machine is idle")
    if usable < cpu["cores"]:
        add("slow", f"this process may use {usable:g} of {cpu['cores']} cores (container or affinity)",
            f"give it more, or set --threads {max(1, int(usable))}")
    available, total = report["memory"]["available"], report["memory"]["total"]
    if total and available < 0.1*total:
        add("slow", f"{gib(available)} of {gib(total)} main memory are left: weights are read from the disk again",
            "end other programs, or take a smaller model")
    if read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") == "powersave" and "intel_pstate" not in read_text(
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"):
        add("slow", "the processor's frequency governor is powersave", "cpupower frequency-set -g performance")
    return findings


def judge_speed(report: "dict[str, Any]") -> "list[Finding]":
    """Kernels and devices."""
    findings, used, cpu = [], report["kernels"], report["processor"]
    if not used["in_use"]:
        findings.append(Finding("broken", f"KVARN_CPU={os.environ.get('KVARN_CPU')} names kernels this processor does not have",
                                f"unset KVARN_CPU (best here: {used['best']})"))
    elif used["in_use"] != used["best"] and os.environ.get("KVARN_CPU") != "fast":
        findings.append(Finding("slow", f"KVARN_CPU selects the kernels {used['in_use']}; the best here are {used['best']}",
                                "unset KVARN_CPU"))
    if used["best"] == "portable":
        needs = "AVX2, FMA and F16C" if cpu["machine"] in ("x86_64", "AMD64") else "64-bit ARM"
        findings.append(Finding("slow", f"the portable kernels are in use: the fast ones need {needs}", "another processor"))
    kinds = {device["type"] for device in report["devices"]}
    has_nvidia = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if has_nvidia and not kinds & {"GPU", "integrated GPU"}:
        built = "cuda" in report["libraries"]["backends"]
        what = "do not get to a device of it" if built else "are built without CUDA"
        do = "check nvidia-smi" if built else "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps ."
        findings.append(Finding("slow", f"there is an NVIDIA driver, and the libraries {what}", do))
    if sys.platform == "darwin" and "metal" not in report["libraries"]["backends"]:
        findings.append(Finding("slow", "the libraries are built without Metal", "CMAKE_ARGS=-DGGML_METAL=on pip install ."))
    return findings


# --- saying ---


def gib(n: int) -> str:
    return f"{n/2**30:.1f} GiB"


def lines(report: "dict[str, Any]") -> "list[str]":
    cpu, packages = report["processor"], report["packages"]
    out = [f"kvarn        {report['kvarn']}, Python {report['python']}, {report['platform']}"]
    if "libraries" in report:
        libraries = report["libraries"]
        levels = [name for name in libraries["backends"] if name.startswith("cpu-")]
        backends = ", ".join(name for name in libraries["backends"] if name not in levels)
        if levels:
            backends = ", ".join(filter(None, (backends, f"{libraries.get('cpu', 'none')} of {len(levels)} CPU levels")))
        out += [f"libraries    {libraries['folder']} ({libraries['bytes']/2**20:.0f} MiB), backends: {backends}",
                f"cache types  {', '.join(libraries['cache_types'])}, tile format {libraries['format_version']}"]
    for device in report.get("devices", []):
        out.append(f"device       {device['name']} ({device['type']}): {device['description']}"
                   + (f", {gib(device['free'])} of {gib(device['total'])} free" if device["total"] else ""))
    out.append(f"processor    {cpu['name']}, {cpu['usable_cores']} cores" + (f"; {' '.join(cpu['has'])}" if cpu["has"] else ""))
    if "kernels" in report:
        fast = "" if report["kernels"]["in_use"] == "portable" else ", straight from the codes"
        out.append(f"kernels      {report['kernels']['in_use'] or 'none'}{fast}")
    if report["memory"]["total"]:
        out.append(f"memory       {gib(report['memory']['available'])} of {gib(report['memory']['total'])} available")
    out.append("packages     " + ", ".join(f"{name} {version or '-'}" for name, version in packages.items()))
    for finding in report["findings"]:
        out.append(f"\n{finding['level'] + ':':7} {finding['what']}" + (f"\n        {finding['do']}" if finding["do"] else ""))
    if not report["findings"]:
        out.append("\nnothing is wrong, and nothing slows it down")
    return out


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
    return int(any(finding["level"] == "broken" for finding in report["findings"]))
