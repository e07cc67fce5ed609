"""`python -m d2det.ops`: which implementation each operator uses, and why."""

from __future__ import annotations

import torch

from ._build_info import build_info, cuda_build_info
from ._library import extension, implementation, references


def main() -> None:
    """Print a line for each operator, then what the compiled libraries are and were built with."""
    width = max(len(name) for name in references)
    print(f"{'operator':{width}}  {'cpu':9}  cuda")
    for name in references:
        print(f"{name:{width}}  {implementation(name, 'cpu'):9}  {implementation(name, 'cuda')}")
    print()
    for line in [*_cpu_lines(), *_cuda_lines()]:
        print(line)


def _cpu_lines() -> list[str]:
    if extension.path is None:
        return [extension.reason, f"torch: {torch.__version__}"]
    info = build_info(extension.path)
    unknown = "unknown: the extension was built from other sources"
    return [
        f"extension: {extension.path}",
        f"torch: {torch.__version__}; the extension was built with {info.get('torch', unknown)}",
        f"instruction sets: {info.get('instruction sets', unknown)}",
        f"instruction set used on this processor: {info.get('instruction set', unknown)}",
    ]


def _cuda_lines() -> list[str]:
    lines = []
    if extension.cuda_path is not None:
        info = cuda_build_info(extension.cuda_path)
        lines += [
            f"extension for CUDA: {extension.cuda_path}",
            f"CUDA architectures: {info.get('architectures', 'unknown')}, built with CUDA "
            f"{info.get('cuda', '(unknown)')}",
        ]
    elif extension.path is not None:
        lines.append(f"extension for CUDA: none. {extension.cuda_reason}")
    if not torch.cuda.is_available():
        return [*lines, "No CUDA device is available to torch here."]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, {major}.{minor}")
    return lines


if __name__ == "__main__":
    main()
