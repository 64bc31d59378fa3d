"""Which nodes of a graph ONNX Runtime places on CUDA, asked on a machine without a GPU.

    python -m venv probe
    probe/bin/pip install "onnxruntime-gpu==1.31.1" "nvidia-cublas>=13.0,<13.1" "nvidia-curand<10.5" \\
        "nvidia-cuda-runtime==13.0.96" "nvidia-cuda-crt==13.0.88" nvidia-cufft
    probe/bin/python benchmarks/cuda_placement.py scout-cuda/decoder.onnx

CUDA's runtime library is shadowed by a stand-in that claims a device of capability 8.9 and has host memory. The session
is created and its kernels constructed; nothing is run, and weights are not prepacked. It needs a C compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

STAND_IN = r"""
#include <stdlib.h>
#include <string.h>
#include <driver_types.h>
#define OK(name, ...) cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
OK(cudaSetDevice, int d)
OK(cudaDeviceSynchronize, void)
OK(cudaStreamSynchronize, cudaStream_t s)
OK(cudaStreamDestroy, cudaStream_t s)
OK(cudaEventDestroy, cudaEvent_t e)
OK(cudaEventRecord, cudaEvent_t e, cudaStream_t s)
OK(cudaGetLastError, void)
OK(cudaPeekAtLastError, void)
cudaError_t cudaGetDevice(int *d) { *d = 0; return 0; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaMemGetInfo(size_t *a, size_t *b) { *a = *b = (size_t)16 << 30; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  p->major = 8; p->minor = 9; p->multiProcessorCount = 100; p->maxThreadsPerBlock = 1024; p->warpSize = 32;
  p->totalGlobalMem = (size_t)16 << 30;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  *v = a == cudaDevAttrComputeCapabilityMajor ? 8 : 9;
  return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = (cudaStream_t)1; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = (cudaEvent_t)1; return 0; }
cudaError_t cudaMalloc(void **p, size_t n) { *p = aligned_alloc(256, (n + 255) / 256 * 256); return 0; }
cudaError_t cudaFree(void *p) { free(p); return 0; }
cudaError_t cudaMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); return 0; }
cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { memcpy(d, s, n); return 0; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  memcpy(d, s, n);
  return 0;
}
cudaError_t cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t t) { memset(d, v, n); return 0; }
int cublasCreate_v2(void **h) { *h = (void *)1; return 0; }
int cublasDestroy_v2(void *h) { return 0; }
int cublasSetStream_v2(void *h, void *s) { return 0; }
int cublasSetMathMode(void *h, int m) { return 0; }
int cublasLtCreate(void **h) { *h = (void *)1; return 0; }
int cublasLtDestroy(void *h) { return 0; }
"""
DRIVER = "int cuTensorMapEncodeTiled(void) { return 999; }"  # all that ONNX Runtime 1.31.1 links to of it
OPEN = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 0
options.add_session_config_entry("session.disable_prepacking", "1")
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
"""


def main(graph: str) -> None:
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    nvidia = site / "nvidia/cu13"
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("libstandin.so", STAND_IN), ("libcuda.so.1", DRIVER)):
            command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-I{nvidia}/include", "-xc", "-", "-o"]
            subprocess.run([*command, f"{folder}/{name}"], input=source, text=True, check=True)
        shadowed = {"LD_PRELOAD": f"{folder}/libstandin.so", "LD_LIBRARY_PATH": f"{folder}:{nvidia}/lib"}
        done = subprocess.run(
            [sys.executable, "-c", OPEN, graph], env={**os.environ, **shadowed}, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    placements = done.stderr.partition("Node placements")[2]
    for provider, nodes in re.findall(
        r"placed on \[(\w+)\]\. Number of nodes: \d+(.*?)(?=placed on|\Z)", placements, re.S
    ):
        operators = Counter(re.findall(r"\]    ?(\w+) \(", nodes))
        print(f"{provider}: {operators.total()} nodes: {', '.join(f'{n} {op}' for op, n in sorted(operators.items()))}")


if __name__ == "__main__":
    main(sys.argv[1])
