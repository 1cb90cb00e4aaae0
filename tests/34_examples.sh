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
MAKEFLAGS='' make -s install-lib CC="$cc" CFLAGS=-O2 BUILD="$build" DESTDIR="$build/installed" \
    PREFIX=/usr > "$log" 2>&1 && ok || { bad "make install-lib"; cat "$log"; }

# Nothing but the API is to be seen, and all of it with its version.
for n in $(sed -nE 's/^[a-z].*[ *](medrun_[a-z_]+)\(.*/\1/p' "$installed/include/medrun.h"); do
    case $n in medrun_observer) continue ;; esac
    nm -D "$lib/libmedrun.so" | grep -q " T $n@@MEDRUN_" && ok || bad "$n is not exported"
done
seen=$(nm -D --defined-only "$lib/libmedrun.so" | grep -vE '@@MEDRUN_|A MEDRUN_' | head -3)
[ -z "$seen" ] && ok || bad "libmedrun.so exports $seen"
seen=$(nm -g --defined-only "$lib/libmedrun.a" | awk '/ [A-Z] / && $3 !~ /^medrun_/' | head -3)
[ -z "$seen" ] && ok || bad "libmedrun.a exports $seen"

warn="-Wall -Wextra -pedantic"
# shellcheck disable=SC2086
for name in ask buffer; do
    quiet $cc -O2 -std=c11 $warn -I. -o "$build/example_$name" tools/examples/$name.c \
        "$lib/libmedrun.a" -lm -lpthread && same $name.c "$build/example_$name"
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
        "$build/lib/medrun.o" -lm -lpthread
    LD_LIBRARY_PATH="$build/other" "$build/example_cpp" $demo "$question" > "$log" 2>&1
    grep -q "MEDRUN_.*not found" "$log" && ok || { bad "another version is taken"; cat "$log"; }
fi

if ! command -v python3 > /dev/null; then skip "no python3"
else
    same medrun.py env MEDRUN_LIBRARY="$lib/libmedrun.so" python3 -B tools/examples/medrun.py
    same "medrun.py, by the library's name" env LD_LIBRARY_PATH="$lib" python3 -B \
        tools/examples/medrun.py
fi
finish
