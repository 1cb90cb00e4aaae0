#!/bin/sh
# bench_eval.sh MODEL.mdr [N [BIN]]: asks N (1000) made-up questions of MedQA's length with
# medrun-eval, and says its speed beside that of `medrun-lab bench`, measured before and after.
# A model of random weights in the 8B shape: tools/bench_peers.py.
set -eu
model=$1 n=${2:-1000} bin=${3:-.}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Some 140 words a question, which is what MedQA's have on average, and four short choices.
awk -v n="$n" 'BEGIN {
    srand(7)
    k = split("a the of with and patient woman man pain fever history blood pressure heart rate " \
              "normal shows examination days weeks left right lower upper acute chronic diagnosis " \
              "treatment most likely which following laboratory studies elevated comes physician", w, " ")
    for (i = 0; i < n; i++) {
        text = ""
        for (j = 0; j < 140; j++) text = text (j ? " " : "") w[1 + int(rand() * k)]
        printf "{\"question\": \"%s?\", \"answer_idx\": \"%c\", \"options\": {", text, 65 + i % 4
        for (c = 0; c < 4; c++)
            printf "%s\"%c\": \"%s %s %d\"", c ? ", " : "", 65 + c, w[1 + int(rand() * k)], w[1 + int(rand() * k)], c
        print "}}"
    }
}' > "$work/questions.jsonl"

bench() { "$bin/medrun-lab" bench "$model" -p 512 -n 1 -r 3 -o json | sed 's/.*"pp":{"n":[0-9]*,"tps":\([0-9.]*\).*/\1/'; }
before=$(bench)
"$bin/medrun-eval" "$model" medqa "$work/questions.jsonl" -o "$work/result.jsonl" 2> "$work/err" > /dev/null
speed=$(sed -n 's/.* s: \([0-9.]*\) tokens\/s;.*/\1/p' "$work/err")
after=$(bench)
tail -n 1 "$work/err"
echo "$n questions: $speed tokens/s; medrun-lab bench -p 512: $before before, $after after" |
    awk -v s="$speed" -v a="$before" -v b="$after" '{ printf "%s; share %.2f\n", $0, s / ((a + b) / 2) }'
