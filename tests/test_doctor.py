"""test_doctor.py - kvarn doctor: it sees what is in use, and names what is broken or slow together with what to do.

SPDX-License-Identifier: MIT
"""

import json
import os
import subprocess
import sys

import pytest

from kvarn import doctor


def examine(**env) -> "tuple[int, dict]":
    done = subprocess.run([sys.executable, "-m", "kvarn.cli", "doctor", "--json"], env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def levels(report: dict, word: str) -> "list[str]":
    return [finding["level"] for finding in report["findings"] if word in finding["what"]]


@pytest.mark.llama
def test_what_is_in_use(lib_dir):
    status, report = examine()
    assert status == 0
    assert report["libraries"]["folder"] == str(lib_dir)
    assert report["libraries"]["cpu"] in report["libraries"]["backends"]
    assert report["libraries"]["cache_types"] == ["kvarn2", "kvarn3", "kvarn4"]
    assert any(device["type"] == "CPU" for device in report["devices"])
    assert report["kernels"]["in_use"] == report["kernels"]["best"] != ""
    assert report["packages"]["llama-cpp-python"] == report["wanted_llama_cpp_python"]


@pytest.mark.llama
def test_slow_kernels_are_named():
    status, report = examine(KVARN_CPU="portable")
    assert status == 0 and report["kernels"]["in_use"] == "portable"
    if report["kernels"]["best"] != "portable":
        assert levels(report, "KVARN_CPU selects the kernels portable") == ["slow"]
    status, report = examine(KVARN_CPU="none-such")
    assert status == 1 and levels(report, "names kernels this processor does not have") == ["broken"]


def test_broken_libraries_are_named(tmp_path):
    status, report = examine(KVARN_LIB_PATH=str(tmp_path))
    assert status == 1 and levels(report, f"{tmp_path} has no libggml-base") == ["broken"]
    assert "devices" not in report


@pytest.mark.llama
def test_notes():
    _, report = examine(KVARN_STRICT="1", LLAMA_CPP_LIB_PATH="/somewhere/else")
    assert levels(report, "KVARN_STRICT is set") == ["note"]
    assert levels(report, "LLAMA_CPP_LIB_PATH points to /somewhere/else") == ["note"]


HEALTHY = {"processor": {"machine": "x86_64", "cores": 8, "usable_cores": 8, "quota_cores": None, "load": 0.5, "has": ["avx2"]},
           "packages": {"llama-cpp-python": "1", "gguf": "1", "rich": "1"}, "wanted_llama_cpp_python": "1",
           "memory": {"available": 8 << 30, "total": 16 << 30}, "libraries": {"folder": "lib", "backends": ["cpu"]},
           "devices": [{"type": "CPU"}], "kernels": {"in_use": "avx2", "best": "avx2"}}


@pytest.mark.parametrize("change, level, what", [
    ({}, None, ""),
    ({"processor": {**HEALTHY["processor"], "load": 7.0}}, "slow", "programs ask for 7.0 of 8 cores"),
    ({"processor": {**HEALTHY["processor"], "quota_cores": 1.5}}, "slow", "may use 1.5 of 8 cores"),
    ({"memory": {"available": 1 << 30, "total": 16 << 30}}, "slow", "1.0 GiB of 16.0 GiB main memory are left"),
    ({"kernels": {"in_use": "portable", "best": "portable"}}, "slow", "need AVX2, FMA and F16C"),
    ({"packages": {"llama-cpp-python": "", "gguf": "1", "rich": "1"}}, "note", "llama-cpp-python is not installed"),
    ({"packages": {"llama-cpp-python": "2", "gguf": "1", "rich": "1"}}, "broken", "llama-cpp-python is 2"),
    ({"packages": {"llama-cpp-python": "1", "gguf": "", "rich": "1"}}, "note", "gguf is not installed"),
])
def test_judgement(monkeypatch, change, level, what):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "read_text", lambda path: "")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    for name in ("KVARN_CPU", "LLAMA_CPP_LIB_PATH", *doctor.FOR_TESTS):
        monkeypatch.delenv(name, raising=False)
    found = doctor.judge({**HEALTHY, **change})
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(what in finding.what and finding.do for finding in found)


def test_gpu_that_the_libraries_do_not_use(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    found = doctor.judge_speed(HEALTHY)
    assert [finding.level for finding in found] == ["slow"] and "-DGGML_CUDA=on" in found[0].do
    found = doctor.judge_speed({**HEALTHY, "libraries": {"folder": "lib", "backends": ["cpu", "cuda"]}})
    assert "do not get to a device" in found[0].what


def test_the_level_of_a_wheel_is_named():
    report = {**HEALTHY, "kvarn": "1", "python": "3", "platform": "x", "findings": [], "devices": [],
              "processor": {**HEALTHY["processor"], "name": "one"},
              "libraries": {"folder": "lib", "bytes": 1 << 20, "format_version": 1, "cache_types": ["kvarn2"],
                            "cpu": "cpu-haswell", "backends": ["cpu-haswell", "cpu-x64", "cuda"]}}
    assert "backends: cuda, cpu-haswell of 2 CPU levels" in doctor.lines(report)[1]
