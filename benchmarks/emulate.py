"""The CPU kernels of processors that are not at hand, under emulators: their numbers against the portable kernels'.

    python -m benchmarks.emulate --linux vmlinuz      # results/emulated.json

    avx2        on this processor, where it has it
    aarch64     the portable kernels of an ARM processor, under qemu-aarch64-static
    avx512      under bochs, a whole PC: it starts a Linux whose only program is the harness, and takes minutes

csrc/cpu/harness.cpp runs every kernel on made-up numbers and prints their bits; it knows no torch. Sums are ordered
differently and products are fused in some sets and not in others: numbers agree to `LIMIT` roundings, integers, NaN and
infinities exactly.

On Debian: apt install qemu-user-static g++-aarch64-linux-gnu bochs bochs-term bochsbios vgabios isolinux
syslinux-common xorriso. Any Linux 6.1 serves, such as /boot/vmlinuz-* of the package linux-image-cloud-amd64 (unpacked
by dpkg -x).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from robustft.files import write_file, write_text

ROOT = Path(__file__).parent.parent
LIMIT = 128.0
"""Roundings by which two sums of the same numbers may differ: the largest come from sums that cancel."""
RELATIVE = ("exp_values", "softplus_values")
"""Kernels whose numbers have no common size: each is compared by itself. Elsewhere numbers below 1 count as 1."""
ROUNDINGS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
BOOT_SECONDS = 1200.0
SETS = ("avx2", "aarch64", "avx512")
ARM = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")

Numbers = dict[str, tuple[str, np.ndarray]]


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} is not there; `apt install` what `python -m benchmarks.emulate --help` names")
    return found


def build(folder: Path, variant: str, options: Sequence[str] = ()) -> Path:
    """The harness of one instruction set, compiled with the package's own flags."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DROBUSTFT_HARNESS=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--target", f"harness_{variant}"]):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return folder / f"harness_{variant}"


def parsed(text: str, of: str) -> Numbers:
    """What a harness printed. ValueError where it did not come to its end."""
    lines = iter(text.splitlines())
    found: Numbers = {}
    for line in lines:
        if line == "end":
            return found
        if line.startswith("kernels "):
            continue
        name, kind, count = line.split()
        words: list[str] = []
        while len(words) < int(count):
            words += next(lines, "end").split()
            if words[-1] == "end":
                raise ValueError(f"{of}: the harness stopped at {name}")
        bits = np.array([int(word, 16) for word in words], np.uint64)
        found[name] = kind, as_numbers(bits, kind)
    raise ValueError(f"{of}: the harness stopped after {list(found)[-1:] or 'nothing'}")


def as_numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    size = np.dtype(kind).itemsize
    found = bits.astype(f"u{size}").view(kind)
    return found if kind.startswith("int") else found.astype(np.float64)


def compared(reference: Numbers, other: Numbers) -> dict[str, float]:
    """The largest difference of each kernel and type, in roundings; infinite where what must be equal is not."""
    if list(reference) != list(other):
        raise ValueError("the harnesses ran different kernels")
    worst: dict[str, float] = {}
    for name, (kind, expected) in reference.items():
        found = other[name][1]
        kernel, _, case = name.partition("/")
        key = f"{kernel} {re.split('[,.]', case)[0]}"
        worst[key] = max(worst.get(key, 0.0), difference(expected, found, kind, kernel in RELATIVE))
    return worst


def difference(expected: np.ndarray, found: np.ndarray, kind: str, relative: bool) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if kind.startswith("int"):
        return 0.0 if np.array_equal(expected, found) else float("inf")
    finite = np.isfinite(expected) & np.isfinite(found)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    a, b = expected[finite], found[finite]
    size = np.maximum(np.abs(a), np.finfo(kind).tiny if relative else 1.0)
    return float((np.abs(a - b) / size).max(initial=0.0) / ROUNDINGS[kind])


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + "".join(f"{number:08x}" for number in numbers).encode() + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def booted(program: Path, linux: Path, folder: Path) -> str:
    """What a program prints as the only one of a Linux under bochs."""
    disc = folder / "disc"
    console = cpio_entry("dev", 0o040755) + cpio_entry("dev/console", 0o020600, device=(5, 1))
    init = cpio_entry("init", 0o100755, program.read_bytes())
    write_file(disc / "isolinux" / "initrd", console + init + cpio_entry("TRAILER!!!", 0))
    write_file(disc / "isolinux" / "linux", linux.read_bytes())
    for part in (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")):
        write_file(disc / "isolinux" / part.name, part.read_bytes())
    # bochs 2.7 misstates the size of the compacted state, and Linux would forgo vectors for it: hence no xsavec.
    arguments = "initrd=initrd console=ttyS0 loglevel=4 clearcpuid=xsaves,xsavec mitigations=off nosmp acpi=off"
    started = f"default go\nprompt 0\nlabel go\n kernel linux\n append {arguments}\n"
    write_text(disc / "isolinux" / "isolinux.cfg", started)
    image = ["-as", "mkisofs", "-quiet", "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot"]
    image += ["-boot-load-size", "4", "-boot-info-table", "-o", str(folder / "boot.iso"), str(disc)]
    subprocess.run([needed("xorriso"), *image], check=True, capture_output=True)
    said = folder / "serial"
    settings = f"""
display_library: term
megs: 512
cpu: model=corei7_skylake_x, count=1, ips=50000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={folder / "boot.iso"}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={said}
log: {folder / "log"}
plugin_ctrl: speaker=0
pci: enabled=0
clock: sync=none, time0=1
"""
    write_text(folder / "settings", settings)
    write_text(folder / "commands", "c\n")  # Debian's bochs has a debugger, which waits to be told
    bochs = f"{needed('bochs')} -q -f {folder / 'settings'} -rc {folder / 'commands'}"
    run = subprocess.Popen(  # `script` gives it a terminal to draw on
        [needed("script"), "-qc", bochs, "/dev/null"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"TERM": "vt100", "PATH": "/usr/bin:/bin"},
    )
    try:
        return awaited(said, run)
    finally:
        run.terminate()
        run.wait()


def awaited(said: Path, run: subprocess.Popen[bytes]) -> str:
    """The harness' lines among the kernel's, once it has ended."""
    until = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < until and run.poll() is None:
        time.sleep(1)
        text = said.read_text(errors="replace").replace("\r", "") if said.exists() else ""
        # Where the kernel speaks in the middle of a line, the line goes on after it.
        text = re.sub(r"\[ *\d+\.\d+\] [^\n]*\n", "", text[text.find("kernels ") :] if "kernels " in text else "")
        if "\nend\n" in text:
            return text
        if said.exists() and "Kernel panic" in said.read_text(errors="replace"):
            break
    raise SystemExit(f"the harness did not end under bochs; the last of what was said:\n{said.read_text()[-2000:]}")


def sources_digest() -> str:
    """Of what the harness is made of: the kernels, their headers and itself."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc" / "cpu").rglob("*")):
        if path.suffix == ".h" or path.name.endswith("kernels.cpp") or path.name == "harness.cpp":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def table(results: Mapping[str, Any]) -> str:
    sets = results["sets"]
    kernels = sorted({kernel for held in sets.values() for kernel in held["kernels"]})
    heads = [f"{name} ({held['by']})" for name, held in sets.items()]
    rows = [["kernel, type", *heads], ["---"] * (1 + len(heads))]
    rows += [[kernel, *(f"{held['kernels'][kernel]:.1f}" for held in sets.values())] for kernel in kernels]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--linux", type=Path, help="a Linux for avx512, as /boot/vmlinuz-*")
    options = parser.parse_args()
    if "avx512" in options.only and not (options.linux and options.linux.is_file()):
        parser.error("avx512 needs --linux, a Linux to start under bochs")
    results: dict[str, Any] = {"limit": LIMIT, "sources": sources_digest(), "sets": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def printed(*command: str) -> str:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        reference = parsed(printed(str(build(folder / "here", "portable"))), "portable")
        for which in options.only:
            if which == "aarch64":
                needed("aarch64-linux-gnu-g++")
                program = build(folder / "arm", "portable", ARM)
                text, by = printed(needed("qemu-aarch64-static"), str(program)), "qemu"
            elif which == "avx512":
                text, by = booted(build(folder / "here", "avx512"), options.linux, folder / "pc"), "bochs"
            else:
                text, by = printed(str(build(folder / "here", "avx2"))), "this processor"
            worst = compared(reference, parsed(text, which))
            most = max(worst, key=lambda key: worst[key])
            print(f"{which}, {by}: {len(worst)} kernels and types; at most {worst[most]:.1f} roundings ({most})")
            results["sets"][which] = {"by": by, "kernels": {key: round(value, 2) for key, value in worst.items()}}
            if worst[most] > LIMIT:
                raise SystemExit(f"{which}: more than {LIMIT} roundings")
    only = "" if len(options.only) == len(SETS) else " --only " + " ".join(options.only)
    print(machine.write("emulated", f"python -m benchmarks.emulate{only} --linux vmlinuz", results))


if __name__ == "__main__":
    main()
