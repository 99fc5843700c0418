# Source this before running MLX on Linux:  . scripts/blas.sh
# MLX's Linux wheel is linked with the reference BLAS. OpenBLAS, loaded ahead of it, makes float32
# products 50-90 times faster. Nothing is changed on a Mac, and nothing is installed.
if [ "$(uname -s)" = Linux ]; then
  _openblas=$(ls /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0 \
    /usr/lib64/libopenblasp.so.0 /usr/lib64/libopenblas.so.0 2>/dev/null | head -n 1)
  if [ -n "$_openblas" ]; then
    export LD_PRELOAD="$_openblas${LD_PRELOAD:+:$LD_PRELOAD}"
    # Old OpenBLAS releases do not know new AVX-512 processors and fall back to slower kernels.
    if [ -z "${OPENBLAS_CORETYPE:-}" ] && grep -q avx512f /proc/cpuinfo; then
      export OPENBLAS_CORETYPE=SkylakeX
    fi
    echo "blas: OpenBLAS ($_openblas)" >&2
  else
    echo "blas: OpenBLAS not found, MLX uses the slow reference BLAS here" \
      "(Debian, Ubuntu: apt-get install libopenblas0-pthread)" >&2
  fi
  unset _openblas
fi
