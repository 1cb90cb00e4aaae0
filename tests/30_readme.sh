#!/bin/sh
# 30_readme.sh BIN BUILD: what the README promises. The example program is taken from it, built and
# run; the one-line build; the size; no socket call.
bin=$1 build=$2
cc=${CC:-cc}
. tests/script.sh
question="What are the symptoms of diabetes?"

sed -n '/^```c$/,/^```$/p' README.md | sed '1d;$d' > "$build/ask.c"
cmp "$build/ask.c" tools/examples/ask.c && ok || bad "the example differs from tools/examples/ask.c"
if $cc -O2 -DMEDRUN_NO_MAIN -c medrun.c -o "$build/medrun.o" 2> "$build/ask.log" &&
   $cc -O2 -Wall -Wextra -I. -o "$build/ask" "$build/ask.c" "$build/medrun.o" -lm -lpthread \
       2>> "$build/ask.log" && [ ! -s "$build/ask.log" ]; then ok
else bad "the example program does not build quietly"; cat "$build/ask.log"; fi

answer=$("$build/ask" tools/demo/demo.mdr "$question")
[ "$answer" = "$("$bin/medrun" run -q tools/demo/demo.mdr -p "$question")" ] && ok ||
    bad "the example answers \"$answer\""
case "$answer" in *thirst*) ok ;; *) bad "no thirst in \"$answer\"" ;; esac
"$build/ask" README.md > /dev/null 2>&1 && bad "the example opens a text file" || ok

if $cc -O2 -o "$build/one" medrun.c -lm -lpthread 2> "$build/one.log" && [ ! -s "$build/one.log" ]
then ok; else bad "the one-line build"; fi
if command -v strip > /dev/null; then
    strip -o "$build/one.stripped" "$build/one"
    n=$(wc -c < "$build/one.stripped")
    [ "$n" -lt 420000 ] && ok || bad "stripped binary of $n bytes"
fi
if command -v nm > /dev/null; then
    nm -D "$build/one" | grep -qE ' (socket|connect|bind|listen|accept|getaddrinfo|gethostbyname)(@|$)' &&
        bad "the binary calls sockets" || ok
fi

"$bin/medrun" verify -q tools/demo/demo.mdr > "$build/verify.log" 2>&1 && ok ||
    { bad "verify"; cat "$build/verify.log"; }
a=$("$bin/medrun" tokenize tokenizer.bin -p "$question")
b=$("$bin/medrun" tokenize tools/demo/demo.mdr -p "$question")
[ -n "$a" ] && [ "$a" = "$b" ] && ok || bad "tokenizer.bin is not the demo model's: $a / $b"
for command in run chat show verify tokenize detokenize render logits; do
    "$bin/medrun" help $command > /dev/null 2>&1 && ok || bad "help $command"
done
finish
