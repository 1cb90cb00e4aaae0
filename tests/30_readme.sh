#!/bin/sh
# 30_readme.sh BIN BUILD: what the README promises. Each of its commands is run, on small models that
# stand in for those it names; the example program is taken from it, built and run; the one-line
# build; the size; no socket call.
bin=$1 build=$2
cc=${CC:-cc}
. tests/script.sh
question="What are the symptoms of diabetes?"

# It is for the first hour: its length, and the words of a sentence outside code, tables, headings.
n=$(wc -l < README.md); [ "$n" -le 220 ] && ok || bad "README.md has $n lines, at most 220"
n=$(wc -w < README.md); [ "$n" -le 2000 ] && ok || bad "README.md has $n words, at most 2000"
n=$(awk '/^```/ { code = !code; next }
    code || /^\|/ || /^#/ { next }
    /^$/ || /^- / { text = text "\n" }
    { sub(/^- /, ""); text = text " " $0 }
    END {
        gsub(/`[^`]*`/, "x", text)
        n = split(text, sentence, /[.!?:] |\n/)
        for (i = 1; i <= n; i++) {
            k = split(sentence[i], w, " "); words = 0
            for (j = 1; j <= k; j++) words += w[j] ~ /[A-Za-z0-9]/
            if (words > 1) { all += words; count++ }
        }
        printf "%d", 10 * all / count
    }' README.md)
[ "$n" -le 160 ] && ok || bad "README.md has $n tenths of a word a sentence, at most 160"
# The questions it says the demo model answers and turns away.
asked() { sed -n "/^It $1: /,/^\$/p" README.md | tr '\n' ' ' | grep -o '\*[A-Z][^*]*?\*' | tr -d '*'; }
asked answers > "$build/answers"; asked 'turns away' > "$build/refusals"
[ "$(wc -l < "$build/answers") $(wc -l < "$build/refusals")" = "10 3" ] && ok || bad "README.md's questions"
while read -r q; do
    a=$("$bin/medrun" run -q tools/demo/demo.mdr -p "$q" < /dev/null)
    case $a in 'I cannot'*|'I only'*|'') bad "README.md: $q: $a" ;; *) ok ;; esac
done < "$build/answers"
while read -r q; do
    a=$("$bin/medrun" run -q tools/demo/demo.mdr -p "$q" < /dev/null)
    case $a in 'I cannot'*|'I only'*) ok ;; *) bad "README.md: $q: $a" ;; esac
done < "$build/refusals"

# Its commands, in order: lines of blocks, and what stands between ` in text or a table. In a folder where the
# files it names are.
top=$PWD at="$build/readme"
case $bin in /*) ;; *) bin=$PWD/$bin ;; esac
case $build in /*) ;; *) build=$PWD/$build at=$build/readme ;; esac
rm -rf "$at"
mkdir -p "$at"
for f in medrun medrun-export medrun-eval medrun-lab medrun-serve medrun-explain; do
    [ -x "$bin/$f" ] && ln -s "$bin/$f" "$at/$f"
done
ln -s "$top/tools" "$at/tools"
ln -s "$top/tests/fixtures/llama-plain" "$at/FOLDER"
cp -r tests/fixtures/llama-plain "$at/Llama3-Med42-8B"
cp tests/fixtures/gguf/llama-small-bf16.gguf "$at/FILE.gguf"
cp tests/fixtures/gguf/llama-small-bf16.gguf "$at/Llama3-Med42-8B.Q8_0.gguf"
cp tests/eval/medqa.jsonl "$at/test.jsonl"
cat tools/demo/corpus/*.txt | head -c 100000 > "$at/text.txt"
echo "The patient has had a swollen, painful toe since yesterday." > "$at/note.txt"
for i in 1 2; do
    { sed -n 1,12p tools/demo/README.md; echo "Question $i: what is gout?"; } > "$at/guideline-and-question-$i.txt"
done
awk '/^```/ { code = !code && $0 == "```"; next }
     code && /^(make|\.\/)/ { sub(/ +#.*/, ""); if (sub(/\\$/, "")) printf "%s", $0; else print }
     !code { n = split($0, part, "`"); for (i = 2; i <= n; i += 2) if (part[i] ~ /^(\.\/|eval)/) print part[i] }
' README.md > "$build/readme.commands"
n=$(wc -l < "$build/readme.commands"); [ "$n" -ge 18 ] && ok || bad "README.md has only $n commands"
while read -r command; do
    case $command in make*) continue ;; esac
    cp -f tools/demo/demo.mdr "$at/MODEL.mdr"
    case $command in *medrun-serve*)                    # serves until it is stopped
        command="timeout 3 $(echo "$command" | sed 's/8080/18431/') 2> err; [ \$? = 124 ] && grep 127.0.0.1 err" ;;
    esac
    (cd "$at" && echo "What is gout?" > in && bash -c "$command" < in > out 2> err) && ok ||
        { bad "README.md: $command"; cat "$at/err"; }
done < "$build/readme.commands"
for f in answer.txt guideline.prefix medqa.jsonl medqa.html; do [ -s "$at/$f" ] && ok || bad "no $f"; done
# What it says that `make run` prints, but for this machine's kernels and threads.
"$bin/medrun" run tools/demo/demo.mdr -p "$question" > "$build/run.txt" 2>&1
same() { sed -E 's/[a-z0-9-]+ kernels, [0-9]+ threads?/KERNELS/; s/; built with MEDRUN_SCALAR.*//'; }
awk '/^medrun 0/ { p = 1 } /^```/ { p = 0 } p' README.md | same > "$build/run.wanted"
sort "$build/run.wanted" > "$build/run.wanted.sorted"
same < "$build/run.txt" | sort | cmp -s - "$build/run.wanted.sorted" && ok || bad "make run prints: $(cat "$build/run.txt")"
make -n run | grep -q -- "-p \"$question\"" && ok || bad "make run asks something else"

sed -n '/^```c$/,/^```$/p' README.md | sed '1d;$d' > "$build/ask.c"
cmp "$build/ask.c" tools/examples/ask.c && ok || bad "the example differs from tools/examples/ask.c"
# What is built here is compiled sooner unless in make test-all.
library=-O2 program=-O2
[ -n "$MEDRUN_TEST_ALL" ] || library="-O0 -DMEDRUN_SCALAR" program=$library
# shellcheck disable=SC2086
if $cc $library -DMEDRUN_NO_MAIN -c medrun.c -o "$build/medrun.o" 2> "$build/ask.log" &&
   $cc -O2 -Wall -Wextra -I. -o "$build/ask" "$build/ask.c" "$build/medrun.o" -lm -lpthread \
       2>> "$build/ask.log" && [ ! -s "$build/ask.log" ]; then ok
else bad "the example program does not build quietly"; cat "$build/ask.log"; fi

answer=$("$build/ask" tools/demo/demo.mdr "$question")
[ "$answer" = "$("$bin/medrun" run -q tools/demo/demo.mdr -p "$question")" ] && ok ||
    bad "the example answers \"$answer\""
case "$answer" in *thirst*) ok ;; *) bad "no thirst in \"$answer\"" ;; esac
"$build/ask" README.md > /dev/null 2>&1 && bad "the example opens a text file" || ok

# shellcheck disable=SC2086
if $cc $program -o "$build/one" medrun.c -lm -lpthread 2> "$build/one.log" && [ ! -s "$build/one.log" ]
then ok; else bad "the one-line build"; fi
if [ "$program" = -O2 ] && command -v strip > /dev/null; then
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
