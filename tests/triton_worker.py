"""Compile the Triton kernels for a GPU that this machine may lack, and print the resources they
need.

This is a separate process, because it must run without the interpreter of Triton.

python tests/triton_worker.py 90 bfloat16 64 0.5 unmasked
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_uhop import attention_triton


NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main(capability: str, dtype: str, width: str, eps: str, masked: str) -> None:
    """Print a JSON line for each kernel: registers, bytes spilled per thread, and bytes of shared
    memory per program."""
    launch = attention_triton.launch_of(getattr(torch, dtype), int(width))
    warps = launch.pop("num_warps")
    has_mask = masked == "masked"
    settings = {"EPS": float(eps), "PRECISION": "tf32x3", "STEPS": attention_triton._NEWTON_STEPS, "KEPT": True}
    constants = {"HAS_MASK": has_mask, "ALL_PRESENT": not has_mask, **settings, **launch}
    for name in ("_forward_kernel", "_grad_query_kernel", "_grad_memory_kernel"):
        source = source_of(getattr(attention_triton, name), NAMES[dtype], constants)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
        registers, spilled = usage(compiled.asm["cubin"])
        print(json.dumps({"kernel": name, "registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}), flush=True)


def source_of(kernel, dtype: str, constants: dict) -> ASTSource:
    """The source of a kernel for tensors of this dtype, aligned to 16 bytes as those of PyTorch
    are."""
    others = {
        **dict.fromkeys(("heads", "queries", "keys"), "i32"),
        **dict.fromkeys(("scale", "scaling"), "fp32"),
        **dict.fromkeys(("escort_mean", "top_of", "threshold", "along"), "*fp32"),
    }
    if constants["HAS_MASK"]:
        others["mask"] = "*i8"
    signature = {name: "constexpr" if name in constants else others.get(name, f"*{dtype}") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")}
    return ASTSource(kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants}, aligned)


def usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", printed))
    return int(found["REG"]), int(found["STACK"])


if __name__ == "__main__":
    main(*sys.argv[1:])
