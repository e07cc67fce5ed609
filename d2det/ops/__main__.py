"""`python -m d2det.ops`: which implementation each operator uses, and why."""

from __future__ import annotations

import torch

from ._library import extension, implementation, references


def main() -> None:
    """Print one line for each operator, then where the compiled extension is or why it is not."""
    width = max(len(name) for name in references)
    print(f"{'operator':{width}}  {'cpu':9}  cuda")
    for name in references:
        print(f"{name:{width}}  {implementation(name, 'cpu'):9}  {implementation(name, 'cuda')}")
    print(f"extension: {extension.path}" if extension.path else extension.reason)
    if not torch.cuda.is_available():
        print("No CUDA device is available to torch here.")


if __name__ == "__main__":
    main()
