#!/bin/sh
# 37_opencl.sh BIN BUILD - devices as users see them: medrun built with OpenCL and without.
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
model=$2/llama-tied-int8.mdr plain=$1/medrun lab=$1/medrun-lab cc=${CC:-cc}
for v in $(env | sed -n 's/^\(MEDRUN_[A-Z_]*\)=.*/\1/p'); do unset "$v"; done

# code N ARGUMENTS: runs $medrun; out and err in $T; the exit code must be N
code() {
    want=$1; shift
    "$medrun" "$@" < /dev/null > "$T/out" 2> "$T/err"; rc=$?
    if [ $rc = "$want" ]; then ok; else bad "medrun $*: exit $rc, wanted $want: $(cat "$T/err")"; fi
}
lab() { program=$medrun; medrun=$lab; code "$@"; medrun=$program; }        # the same of medrun-lab
with() { v=${1%%=*}; export "${1?}"; shift; "$@"; unset "$v"; }      # VARIABLE=VALUE COMMAND
has() { if grep -q -- "$2" "$T/$1"; then ok; else bad "$1 has no '$2': $(cat "$T/$1")"; fi; }
hasnt() { if grep -q -- "$2" "$T/$1"; then bad "$1 has '$2': $(cat "$T/$1")"; else ok; fi; }
same() { if cmp -s "$1" "$2"; then ok; else bad "$1 and $2 differ"; fi; }

medrun=$plain
lab 0 doctor
if grep -q 'not in this build' "$T/out"; then
    code 6 logits "$model" --ids '1 2' -o "$T/none" --device 0; has err 'built without OpenCL'
    code 6 logits "$model" --ids '1 2' -o "$T/none" -ngl 1; has err 'built without OpenCL'
    code 0 run --help; has out 'this build has no OpenCL'
    if grep -q clCreate "$plain"; then bad "$plain has traces of OpenCL"; else ok; fi
fi
code 0 logits "$model" --ids '1 2 3 4 5' -o "$T/wanted" --device none

if ! echo '#include <CL/cl.h>' | $cc -E - > /dev/null 2>&1; then
    skip "no OpenCL headers (opencl-headers)"; finish
fi
medrun=$T/medrun lab=$T/medrun-lab
flags="-O1 -DMEDRUN_OPENCL -DMEDRUN_KERNELS_APART"     # kernels are the same with OpenCL
if ! { $cc $flags -o "$medrun" medrun.c "${OBJ:-$2}/kernels.o" -lm -lpthread -ldl &&
       $cc $flags -o "$lab" tools/lab.c "${OBJ:-$2}/kernels_tools.o" -lm -lpthread -ldl; } > "$T/log" 2>&1; then
    bad "building with OpenCL: $(head -5 "$T/log")"; finish
fi
lab 0 doctor; has out '^OpenCL '
MEDRUN_OPENCL_LIBRARY=./none.so; export MEDRUN_OPENCL_LIBRARY
lab 0 doctor; has out 'no OpenCL library'
code 6 logits "$model" --ids '1 2' -o "$T/none" --device 0; has err 'no OpenCL library'
code 0 logits "$model" --ids '1 2 3 4 5' -o "$T/found"; same "$T/wanted" "$T/found"; hasnt err device
unset MEDRUN_OPENCL_LIBRARY
if ! "$lab" doctor | grep -q '^OpenCL *0'; then
    skip "OpenCL has no device here"; finish
fi
for device in "--device 0" "--device 0 --gpu-layers 1" "--device 0 -ngl 99" "--device none" "-ngl 0"; do
    # shellcheck disable=SC2086
    code 0 logits "$model" --ids '1 2 3 4 5' -o "$T/found" $device; same "$T/wanted" "$T/found"
    case $device in *none|*"ngl 0") hasnt err device: ;; *) has err 'device: .* layers';; esac
done
with MEDRUN_DEVICE=0 code 0 run "$model" -n 3 -p x --raw; has err 'device: .* layers'
code 6 run "$model" -n 3 -p x --device 99; has err 'found no "99"'
code 2 run "$model" -n 3 -p x --device 0 --gpu-layers many; has err 'wanted a whole number'
code 0 run "$model" -n 3 -p x --raw --kv int8 --temp 0; mv "$T/out" "$T/wanted8"
code 0 run "$model" -n 3 -p x --raw --kv int8 --temp 0 --device 0; same "$T/wanted8" "$T/out"
code 2 show "$model" --device 0; has err 'does not go with show'
with MEDRUN_DEVICE_MEMORY=1 code 6 run "$model" -n 3 -p x --device 0; has err '1 MB are not enough'
with MEDRUN_OPENCL_OPTIONS="-D sum=+" code 6 run "$model" -n 3 -p x --device 0
has err 'cannot be built'; has err "error"
# A library that is OpenCL's, but for clFinish, which fails from the 100th time on. It still waits: a
# device that failed writes no more, one that is not waited for writes where memory was given back.
cat > "$T/fails.c" <<'END'
#include <dlfcn.h>
#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>
cl_int clFinish(cl_command_queue q) {
    static int n;
    cl_int (*real)(cl_command_queue) = (cl_int (*)(cl_command_queue))dlsym(RTLD_NEXT, "clFinish");
    cl_int code = real(q);
    return n++ < 100 ? code : -5;
}
END
if $cc -D_GNU_SOURCE -shared -fPIC -o "$T/fails.so" "$T/fails.c" -Wl,--no-as-needed -l:libOpenCL.so.1 -ldl; then
    code 0 run "$model" -n 30 -p x --raw --temp 0; mv "$T/out" "$T/wanted"
    with MEDRUN_OPENCL_LIBRARY="$T/fails.so" code 0 run "$model" -n 30 -p x --raw --temp 0 --device 0
    same "$T/wanted" "$T/out"; has err 'clFinish failed (-5); the processor computed the rest'
else
    skip "no library could be built around OpenCL's"
fi
code 0 run --help; hasnt out 'this build has no OpenCL'; has out '--gpu-layers'
finish
