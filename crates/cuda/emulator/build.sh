#!/bin/sh
# build.sh OUTDIR    builds the stand-ins for libcuda.so.1, libnvrtc.so.13, libcublasLt.so.13 and libnccl.so.2 into OUTDIR
#
# Every kernels/*.cu (and $KERNELS, more files) is a unit of its own in a namespace, on the seam of cpu.h. Its kernels are
# the `extern "C" __global__ void NAME(` of its preprocessed text, so those that macros make are found, too. What has not
# changed is not built again. $PARTIAL=1 leaves out files that do not compile; $JOBS (2), $CXX and $CXXFLAGS are heeded.
set -eu
[ $# -eq 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
mkdir -p "$out/objects"
CXX=${CXX:-g++}
FLAGS="-std=c++17 -O2 -fPIC -fvisibility=hidden -pthread -Wno-psabi -DPHALANX_EMULATOR -I. -I../kernels ${CXXFLAGS:-}"
export CXX FLAGS

# Whether $1 is at least as new as all the others.
current() {
    target=$1; shift
    [ -f "$target" ] || return 1
    for source; do [ ! "$source" -nt "$target" ] || return 1; done
}

compile() {  # SOURCE OBJECT
    $CXX $FLAGS -c -o "$2.part" "$1" && mv "$2.part" "$2"
}

compile_unit() {  # FILE.cu
    unit=$(basename "$1" .cu)
    object=$out/objects/unit-$unit.o
    ! current "$object" "$1" ../kernels/*.h ./*.h build.sh || return 0
    wrapper=$out/objects/unit-$unit.cpp
    text=$($CXX $FLAGS -E -x c++ "$1") || return 1
    # Line markers say where text comes from: the file itself, or a header beside it.
    names=$(printf '%s\n' "$text" | awk '/^# [0-9]/ { keep = $3 ~ /\.cu"$/ || $3 ~ /kernels\/[^\/]*"$/; next } keep' |
        tr '\n' ' ' | grep -oE 'extern "C" +void +[A-Za-z_0-9]+ *\(' | sed 's/ *($//; s/.* //' | sort -u)
    {
        echo '#include "registry.h"'
        echo '#include "device.h"'
        # Headers stay outside of the namespace; kernels of two files may have helpers of one name.
        sed -n 's/^#include \("[^"]*"\).*/#include \1/p' "$1"
        echo "namespace unit_$unit {"
        echo "#include \"$(cd "$(dirname "$1")" && pwd)/$unit.cu\""
        for name in $names; do
            echo "static driver::Registered registered_$name(\"$name\", \"$unit\", $name);"
        done
        echo "}"
    } > "$wrapper"
    compile "$wrapper" "$object"
}

# Called again by xargs, for one unit or one source.
case "${STEP:-}" in
unit) compile_unit "$UNIT" ; exit ;;
source)
    object=$out/objects/$UNIT.o
    current "$object" "$UNIT.cpp" ./*.h build.sh || compile "$UNIT.cpp" "$object"
    exit ;;
esac

# Tests that run at once build into one folder.
exec 9> "$out/lock"
! command -v flock > /dev/null || flock 9

again="STEP=\$1 UNIT=\$2 sh ./build.sh '$out' || { rm -f \"$out/objects/\$1-\$(basename \"\$2\" .cu).o\"; [ -n \"\${PARTIAL:-}\" ] && echo \"left out: \$2\" >&2; }"
{
    for unit in ../kernels/*.cu ${KERNELS:-}; do echo "unit $unit"; done
    for source in driver memory streams launch tensor_map nvrtc cublaslt nccl nccl_sockets; do echo "source $source"; done
} | xargs -P "${JOBS:-2}" -L 1 sh -c "$again" again

units=
for unit in ../kernels/*.cu ${KERNELS:-}; do
    object=$out/objects/unit-$(basename "$unit" .cu).o
    [ ! -f "$object" ] || units="$units $object"
done
link() {  # SONAME INPUTS...
    soname=$1; shift
    short=${soname%.so*}.so
    $CXX -shared -pthread -Wl,-soname,"$soname" -Wl,-Bsymbolic -o "$out/$soname.part" "$@"
    mv "$out/$soname.part" "$out/$soname"
    ln -sf "$soname" "$out/$short"
}
o=$out/objects
link libcuda.so.1 "$o/driver.o" "$o/memory.o" "$o/streams.o" "$o/launch.o" "$o/tensor_map.o" $units -ldl
link libnvrtc.so.13 "$o/nvrtc.o"
# These two put work on the driver's streams, whose library they find beside themselves.
link libcublasLt.so.13 "$o/cublaslt.o" "$out/libcuda.so.1" '-Wl,-rpath,$ORIGIN'
link libnccl.so.2 "$o/nccl.o" "$o/nccl_sockets.o" "$out/libcuda.so.1" '-Wl,-rpath,$ORIGIN'
