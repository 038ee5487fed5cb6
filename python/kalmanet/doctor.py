"""``python -m kalmanet.doctor``: versions, what can run here, and a check that takes a second.

Exit status 0: all well; 1: something is not, and the last line says what.
"""

from __future__ import annotations

import platform
import sys
import time


def _check(device: str) -> tuple[float, float]:
    """Relative errors of the outputs and of the gradients, float32 on the device against the
    definition in float64 on the CPU."""
    import torch

    from .ops import chunk_gka, naive_recurrent_gka

    gen = torch.Generator().manual_seed(0)
    shape = (1, 80, 2, 32)
    q, k, v = (torch.randn(shape, generator=gen) for _ in range(3))
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    g = -torch.rand(shape[:3], generator=gen) * 0.1
    inputs = (q, k, v, g)
    cotangent = torch.randn(shape, generator=gen)

    def run(dtype: torch.dtype):
        where = "cpu" if dtype == torch.float64 else device
        given = [t.to(where, dtype).requires_grad_() for t in inputs]
        q, k, v, g = given
        if dtype == torch.float64:
            o, _ = naive_recurrent_gka(q, k, v, g, g)
        else:
            o, _ = chunk_gka(q, k, v, g, g, solver="direct")
        grads = torch.autograd.grad(o, given, cotangent.to(o))
        return o.cpu(), [grad.cpu() for grad in grads]

    (o, grads), (want, want_grads) = run(torch.float32), run(torch.float64)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    return error(o, want), max(error(a, b) for a, b in zip(grads, want_grads))


def main() -> int:
    from . import __version__

    print(f"kalmanet         {__version__}")
    print(f"Python           {platform.python_version()} ({sys.executable})")
    print(f"machine          {platform.machine()}, {platform.platform()}")
    try:
        import torch

        print(f"PyTorch          {torch.__version__} (CUDA: {torch.version.cuda or 'none'})")
        print(f"threads          {torch.get_num_threads()}")
        from ._backends import backends
        from ._library import LIBRARY_PATH

        print(f"library          {LIBRARY_PATH}")
        print(f"instruction set  {torch.ops.kalmanet.instruction_set()}")
        for i, (name, backend) in enumerate(backends().items()):
            absent = "" if backend.available else "not available; "
            print(f"{'backends' if i == 0 else '':<16} {name}: {absent}{backend.detail}")
        # The definition in float64 is thousands of small products: no work for a second thread.
        torch.set_num_threads(1)
        checks = {}
        for device in ("cpu", "cuda") if backends()["cuda"].available else ("cpu",):
            begun = time.perf_counter()
            checks[device] = (*_check(device), time.perf_counter() - begun)
    except Exception as error:  # the report is for whoever helps: any failure is one line
        print(f"FAILED           {type(error).__name__}: {error}")
        return 1
    for device, (outputs, gradients, seconds) in checks.items():
        print(
            f"self-check       {device}: outputs {outputs:.1e}, gradients {gradients:.1e} "
            f"in {seconds:.2f} s"
        )
        # 15 and 30 times what this problem gives with AVX-512 (1.3e-6, 3.1e-6).
        if not (outputs <= 2e-5 and gradients <= 1e-4):
            print("FAILED           the errors are larger than float32 explains")
            return 1
    print("all well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
