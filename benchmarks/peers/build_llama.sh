#!/bin/sh
# Builds llama.cpp (or a fork with the same llama.h) for this CPU, where that is not done yet, and llama_decode with it.
#   benchmarks/peers/build_llama.sh SOURCE [BUILD] [extra options of cmake]
# SOURCE: its source tree; BUILD: where it is built (default: SOURCE/build); the program is BUILD/llama_decode.
set -eu
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$1" && pwd)
build=${2:-$source/build}
[ $# -lt 2 ] || shift
shift
[ -f "$source/include/llama.h" ] || { echo "build_llama.sh: $source/include/llama.h is missing; give llama.cpp's source tree" >&2; exit 1; }

if [ -z "$(find "$build" -name 'libllama.so' 2>/dev/null)" ]; then
    cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMON=OFF "$@"
    cmake --build "$build" --target llama --parallel "${JOBS:-2}"
fi

kind=
grep -q repack_tensors "$source/include/llama.h" && kind=-DIK_LLAMA
version=${VERSION:-$(git -C "$source" rev-parse --short HEAD 2>/dev/null || basename "$source")}
flags=
for library in $(find "$build" -name 'libllama.so' -o -name 'libggml*.so'); do
    flags="$flags $library -Wl,-rpath,$(dirname "$library")"
done
# shellcheck disable=SC2086
${CXX:-c++} -std=c++17 -O3 -march=native -fopenmp-simd $kind "-DVERSION=\"$version\"" -I"$source/include" -I"$source/ggml/include" \
    "$here/llama_decode.cpp" -o "$build/llama_decode" $flags
echo "$build/llama_decode"
