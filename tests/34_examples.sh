#!/bin/sh
# 34_examples.sh BIN BUILD: the library (make lib, make install-lib) and tools/examples, each of
# which answers as `medrun run` does.
bin=$1 build=$(cd "$2" && pwd)
cc=${CC:-cc}
. tests/script.sh
demo=tools/demo/demo.mdr
question="What are the symptoms of asthma?"
answer=$("$bin/medrun" run -q $demo -p "$question")
log="$build/examples.log"
installed="$build/installed/usr"
lib="$installed/lib"

same() { # NAME COMMAND...: answers as medrun run does
    name=$1
    shift
    found=$("$@" $demo "$question" 2> "$log")
    [ -n "$found" ] && [ "$found" = "$answer" ] && ok || { bad "$name: $found"; cat "$log"; }
    "$@" README.md "$question" > /dev/null 2>&1 && bad "$name opens a text file" || ok
}

quiet() { # COMMAND...: succeeds and says nothing
    if "$@" > "$log" 2>&1 && [ ! -s "$log" ]; then ok; else bad "$*"; cat "$log"; return 1; fi
}

rm -rf "$build/installed"
flags="-O1 -DMEDRUN_SCALAR" made="$build/examples_lib"          # not build/lib, which is people's
[ -z "$MEDRUN_TEST_ALL" ] || flags=-O2 made="$build/examples_lib_all"
MAKEFLAGS='' make -s install-lib CC="$cc" CFLAGS="$flags" BUILD="$build" LIB="$made" DESTDIR="$build/installed" \
    PREFIX=/usr > "$log" 2>&1 && ok || { bad "make install-lib"; cat "$log"; }

# Nothing but the API is to be seen, and all of it with its version.
for n in $(sed -nE 's/^[a-z].*[ *](medrun_[a-z_]+)\(.*/\1/p' "$installed/include/medrun.h"); do
    case $n in medrun_observer | medrun_editor) continue ;; esac
    nm -D "$lib/libmedrun.so" | grep -q " T $n@@MEDRUN_" && ok || bad "$n is not exported"
done
seen=$(nm -D --defined-only "$lib/libmedrun.so" | grep -vE '@@MEDRUN_|A MEDRUN_' | head -3)
[ -z "$seen" ] && ok || bad "libmedrun.so exports $seen"
seen=$(nm -g --defined-only "$lib/libmedrun.a" | awk '/ [A-Z] / && $3 !~ /^medrun_/' | head -3)
[ -z "$seen" ] && ok || bad "libmedrun.a exports $seen"

warn="-Wall -Wextra -pedantic"
# shellcheck disable=SC2086
for name in ask buffer observe; do
    quiet $cc -O2 -std=c11 $warn -I. -o "$build/example_$name" tools/examples/$name.c \
        "$lib/libmedrun.a" -lm -lpthread || continue
    [ $name = observe ] || same $name.c "$build/example_$name"
done
# The embedding and the layers in order, each with a norm; without arguments it says how.
"$build/example_observe" $demo "What is gout?" > "$log" 2>&1 && [ "$(wc -l < "$log")" = 7 ] &&
    awk '$1 != (NR == 1 ? "embed" : "layer_out") || $2 != NR - 2 || $3 <= 0 { exit 1 }' "$log" && ok ||
    { bad "observe.c"; cat "$log"; }
for usage in "$build/example_observe" "$build/example_ask" "python3 -B tools/examples/medrun.py"; do
    command -v "${usage%% *}" > /dev/null || continue
    MEDRUN_LIBRARY="$lib/libmedrun.so" $usage > "$log" 2>&1; code=$?
    [ $code != 0 ] && grep -q '^usage: .*MODEL.mdr' "$log" && ok || { bad "$usage says not how"; cat "$log"; }
done

compiled=
for cxx in g++ clang++; do
    command -v $cxx > /dev/null || { skip "no $cxx"; continue; }
    # shellcheck disable=SC2086
    quiet $cxx -O2 -std=c++17 $warn -I"$installed/include" -L"$lib" -o "$build/example_cpp" \
        tools/examples/ask.cpp -lmedrun || continue
    compiled=$cxx
    same "ask.cpp by $cxx" env LD_LIBRARY_PATH="$lib" "$build/example_cpp"
done

# A program does not start with a library of other structs, whatever that is called.
if [ -n "$compiled" ]; then
    mkdir -p "$build/other"
    so=$(basename "$(readlink "$lib/libmedrun.so")")
    echo 'MEDRUN_9.9 { global: medrun_*; local: *; };' > "$build/other/map"
    $cc -shared -Wl,-soname,"$so" -Wl,--version-script,"$build/other/map" -o "$build/other/$so" \
        "$made/medrun.o" -lm -lpthread
    LD_LIBRARY_PATH="$build/other" "$build/example_cpp" $demo "$question" > "$log" 2>&1
    grep -q "MEDRUN_.*not found" "$log" && ok || { bad "another version is taken"; cat "$log"; }
fi

if ! command -v python3 > /dev/null; then skip "no python3"
else
    same medrun.py env MEDRUN_LIBRARY="$lib/libmedrun.so" python3 -B tools/examples/medrun.py
    mkdir -p "$build/beside"
    cp tools/examples/medrun.py "$build/beside"
    same "medrun.py, by the library's name" env LD_LIBRARY_PATH="$lib" python3 -B "$build/beside/medrun.py"
    cp "$lib/libmedrun.so" "$build/beside/$(basename "$(readlink "$lib/libmedrun.so")")"
    same "medrun.py, with the library beside it" python3 -B "$build/beside/medrun.py"
    n=$(wc -l < tools/examples/medrun.py); [ "$n" -le 90 ] && ok || bad "medrun.py has $n lines"
    # The structs of both languages have the same sizes.
    printf '#include <medrun.h>\n#include <stdio.h>\nint main(void) { printf("%%zu %%zu %%zu %%zu %%zu\\n", sizeof(medrun_error), sizeof(medrun_options), sizeof(medrun_sampling), sizeof(medrun_info), sizeof(medrun_session_options)); }\n' > "$build/sizes.c"
    quiet $cc -I"$installed/include" -o "$build/sizes" "$build/sizes.c"
    found=$(PYTHONPATH="$build/beside" python3 -B -c 'import ctypes, medrun as m
print(*map(ctypes.sizeof, (m.Error, m.ModelOptions, m.Sampling, m.Info, m.Options)))')
    [ "$found" = "$("$build/sizes")" ] && ok || bad "medrun.py: structs of $found bytes, in C $("$build/sizes")"
    # The struct that is read has every field in its place; sampling; logits; what is wrong.
    PYTHONPATH="$build/beside" python3 -B - "$bin/medrun" "$build" > "$log" 2>&1 <<'EOF' && ok || { bad "medrun.py"; cat "$log"; }
import array, os, subprocess, sys
from medrun import Model
demo, medrun = "tools/demo/demo.mdr", sys.argv[1]
with Model(demo, context=256, temperature=1, seed=5) as m:
    i = m.info
    assert (i.name, i.type, i.vocab_size, i.n_layers) == (b"medrun demo", b"int8", 4096, 6)
    assert i.max_positions == 2048 and i.file_bytes == os.path.getsize(demo) and i.device == b""
    assert abs(i.sampling.top_p - 1) < 1e-6 and i.sampling.temperature == 0
    warm = "".join(m.ask("What is asthma?"))
    out = sys.argv[2] + "/examples.f32"
    ids = subprocess.run([medrun, "tokenize", demo, "--bos", "-p", "What is"], capture_output=True).stdout
    subprocess.run([medrun, "logits", demo, "--ids", ids.decode().strip(), "-o", out, "--force"], check=True)
    wanted = array.array("f", open(out, "rb").read())
    os.remove(out)
    assert m.logits("What is") == list(wanted)
    assert m.logits("What is") == list(wanted)
with Model(demo, temperature=1, seed=5) as m:
    assert "".join(m.ask("What is asthma?")) == warm
for wrong, error in ((lambda: Model(demo, temprature=1), AttributeError),
                     (lambda: list(m.ask("closed")), RuntimeError), (lambda: m.logits("x"), RuntimeError),
                     (lambda: Model(demo, temperature=-1), RuntimeError)):
    try: wrong()
    except error: continue
    raise SystemExit("nothing was wrong")
EOF
fi
finish
