#!/bin/sh
# 43_explain.sh BIN BUILD - medrun-explain as people use it: what it writes and refuses, hostile text,
# what it may cost; its numbers beside transformers where PYTHON has torch; the page in a browser
# where there is one (43_explain_page.py).
bin=$1 build=$2
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
explain=$bin/medrun-explain model=tools/demo/demo.mdr data=tests/eval python=${PYTHON:-python3}
question="What are the symptoms of diabetes?"
LC_ALL=C; export LC_ALL
for v in $(env | sed -n 's/^\(MEDRUN_[A-Z_]*\)=.*/\1/p'); do
    case $v in MEDRUN_TEST_*) ;; *) unset "$v" ;; esac
done

# code N ARGUMENTS: out and err in $T; the exit code must be N
code() {
    want=$1; shift
    "$explain" "$@" </dev/null >"$T/out" 2>"$T/err"; rc=$?
    if [ $rc = "$want" ]; then ok; else bad "$*: exit $rc, wanted $want: $(cat "$T/err")"; fi
}
err_has() { check "stderr has '$1': $(cat "$T/err")" grep -q -- "$1" "$T/err"; }
# refused N WORDS ARGUMENTS: one line with these words, and nothing is left behind
refused() {
    want=$1 words=$2; shift 2
    code "$want" "$@" -o "$T/no.html"; err_has "$words"
    check "one line: $(cat "$T/err")" [ "$(wc -l <"$T/err")" = 1 ]
    check "nothing is left: $*" [ -z "$(ls "$T"/no* 2>/dev/null)" ]
}

sh tools/explain_page.sh > "$T/page.h"
check "explain_page.h is that of explain_page.html, .css and .js: make tools/explain_page.h" \
    cmp -s "$T/page.h" tools/explain_page.h
check "the page's own code stays under 150 kB" [ "$(wc -c < "$T/page.h")" -lt 150000 ]

if ! "$python" -c "import json" 2> /dev/null; then skip "no $python to read JSON"; finish; fi

# ---- the line ----
code 0 --version; check "version" grep -q '^medrun-explain [0-9]' "$T/out"
code 0 --help; check "help" grep -q -- '--what-if OLD=>NEW' "$T/out"
check "help within 78 columns" [ -z "$(awk 'length > 78' "$T/out")" ]
refused 2 'wanted MODEL.mdr'
refused 2 'wanted one of -p' "$model"
refused 2 'found 2' "$model" -p x --ids "1 2"
code 2 "$model" -p x; err_has 'wanted -o'
refused 3 'cannot open' "$T/none.mdr" -p x
if [ -c /dev/zero ]; then               # a stream without an end, and a file that is too long
    "$explain" "$model" -f - -o "$T/no.html" < /dev/zero 2> "$T/err"; rc=$?
    check "a stream without an end: exit $rc" [ $rc = 5 ]
    head -c 40000000 /dev/zero | tr '\0' x > "$T/long"
    refused 5 'over 59392 bytes' "$model" -f "$T/long"
    refused 3 'over 16777216 bytes' "$model" --chat "$T/long"; rm "$T/long"
fi
refused 2 'stands in the text 5 times, at bytes 3, 6, 9, 12, 15' "$model" -p "What a day a day" --what-if 'a=>b' --seed 1
refused 2 'does not stand in the text' "$model" -p "$question" --what-if 'gout=>flu'
refused 2 "wanted 'OLD=>NEW'" "$model" -p "$question" --what-if gout
code 0 "$model" --template alpaca -p "a ### Response: b" -n 1 -o "$T/marks.html"; err_has 'warning: the text holds "### Response:"'
code 0 "$model" -p "a ### Response: b" -n 1 -o "$T/marks.html" --force
check 'no warning where turns are control tokens' [ -z "$(grep warning "$T/err")" ]
refused 2 'begin with the same token' "$model" -p "$question" --options "thirst,thirst"
refused 2 'wanted 2 to' "$model" -p "$question" --options "a,,b"
refused 2 'position from 1 to' "$model" -p "$question" -n 0 --why 400
refused 2 'the answer ended at' "$model" -p "$question" --why 79
refused 2 'question 99' "$model" --mcq "$data/medqa.jsonl:99" --task medqa
refused 2 'wanted auto, all, none' "$model" -p "$question" --lens 5x
refused 2 'wanted positions\|wanted auto' "$model" -p "$question" --lens 4000
refused 2 'LAYER.HEAD' "$model" -p "$question" --ablate 9.1
refused 2 'LAYER.HEAD' "$model" -p "$question" --ablate 1.0
refused 2 'one of them only' "$model" -p "$question" --leave-out sentences
refused 2 'wanted --mcq' "$model" -p "$question" --rotate
refused 2 'no text to change' "$model" --ids "1 2 3" --what-if 'a=>b'
refused 2 'from 0 to 4095' "$model" --ids "1 2 4096"
refused 2 'budget is 0.1' "$model" -p "$question" --budget 0.1
refused 2 'vocabulary of' "$model" -p "$question" --compare "$build/llama-tied-int8.mdr"
refused 5 'longer than the' "$model" -p "$question" -n 4000
refused 2 'found f8' "$model" -p "$question" --kv f8
for n in 'x' '-1' '1.5'; do refused 2 'predict' "$model" -p "$question" -n "$n"; done
printf '\377\376x' > "$T/utf16"; refused 3 'UTF-16' "$model" -f "$T/utf16"

# ---- the page ----
code 0 "$model" -p "$question" -o "$T/a.html" --json "$T/a.json"
err_has '17 + 24 tokens'
check "the page is its owner's alone" [ "$(stat -c %a "$T/a.html" "$T/a.json" | tr '\n' ' ')" = "600 600 " ]
check "no address in the page" [ "$(grep -c 'https\?://' "$T/a.html")" = 0 ]
check "the demo's page stays under 1 MB" [ "$(wc -c < "$T/a.html")" -lt 1000000 ]
check "JSON is JSON" "$python" -c "import json, sys; json.load(open(sys.argv[1]))" "$T/a.json"
code 0 "$model" -p "$question" -o "$T/a.html" -q; check "quiet" [ ! -s "$T/err" ]
echo text > "$T/mine"; code 2 "$model" -p "$question" -o "$T/mine"; err_has 'is not a page'
check "what stood there stays" [ "$(cat "$T/mine")" = text ]
code 0 "$model" -p "$question" -o "$T/mine" --force -q
code 0 "$model" -p "$question" -n 0 -o - -q; check "- is stdout" grep -q 'id="bin"' "$T/out"
ln -s "$T/a.html" "$T/link"; code 2 "$model" -p "$question" -o "$T/link"; err_has 'symbolic link'

# the same bytes, but for time and command line
numbers() { sed '/^"time":/d' "$1"; }
for how in "-t 1" "-t 2 -b 7" "-b 1"; do
    # shellcheck disable=SC2086
    code 0 "$model" -p "$question" -o "$T/b.html" -q $how
    numbers "$T/a.html" > "$T/1"; numbers "$T/b.html" > "$T/2"
    check "the same page with $how" cmp -s "$T/1" "$T/2"
done
# what is shown is what medrun says
"$bin/medrun" run "$model" -p "$question" -q > "$T/said" 2> /dev/null
"$python" - "$T/a.json" "$T/said" << 'P' && ok || bad "the page's answer is medrun's"
import json, sys
j = json.load(open(sys.argv[1]))
text = "".join(j["pieces"][str(i)] for i, role in j["tokens"] if role == 2)
sys.exit(text.strip() != open(sys.argv[2]).read().strip())
P
# a question: the letters' log-likelihoods differ as medrun-eval says
m="$build/llama-tied-int8.mdr"
code 0 "$m" --mcq "$data/medqa.jsonl:2" --task medqa --rotate --leave-out sentences -o "$T/q.html" --json "$T/q.json" -q
"$bin/medrun-eval" "$m" medqa "$data/medqa.jsonl" --limit 2 -o "$T/r.jsonl" -q > /dev/null
"$python" - "$T/q.json" "$T/r.jsonl" << 'P' && ok || bad "the options are those of medrun-eval"
import json, sys
a = [o["logp"] for o in json.load(open(sys.argv[1]))["options"]["list"]]
b = json.loads(open(sys.argv[2]).read().splitlines()[-1])["ll"]
sys.exit(max(abs((x - a[0]) - (y - b[0])) for x, y in zip(a, b)) > 1e-5)
P
check "three sentences, four rotations" "$python" -c "import json, sys; j = json.load(open(sys.argv[1]))
sys.exit((len(j['left_out']), len(j['rotations'])) != (3, 4))" "$T/q.json"
# all at once; and a checkpoint beside itself differs nowhere
code 0 "$model" -p "$question" --why 22 --versus " weight" --what-if 'diabetes=>asthma' --what-if ' of diabetes=>' \
    --ablate 4.2,mlp5 --patch 'diabetes=>asthma' --compare "$model" --mid -o "$T/c.html" --json "$T/c.json" -q
check "the changes are there, and the twin differs nowhere" "$python" -c "import json, sys; j = json.load(open(sys.argv[1]))
sys.exit(not (len(j['what_if']) == 2 and len(j['ablations']) == 2 and max(j['other_kl']) < 1e-6
              and len(j['patched']) == 4 * 6
              and abs(j['patched'][0] - j['total'][0]) < 1e-4))" "$T/c.json"

# A long text: attention of the first token, of those that are left out as one sum, and of the last 511.
# Its row 511 is that of the same text's first 512 tokens, which has each weight by itself.
ids=$(awk 'BEGIN { for (i = 0; i < 700; i++) printf "%d ", i * i * 7 % 3989 }')
code 0 "$model" --ids "$ids" -n 0 --why 512 -o "$T/long.html" --json "$T/long.json" -q
code 0 "$model" --ids "$ids" -n 0 --why 100 --json "$T/early.json" -q
code 0 "$model" --ids "$(echo "$ids" | cut -d' ' -f1-512)" -n 0 --json "$T/512.json" -q
"$python" - "$T/long.json" "$T/early.json" "$T/512.json" << 'P' && ok || bad "attention of a long text"
import json, sys
def read(path, at):
    j = json.load(open(path))
    shape = {b["name"]: b["shape"] for b in j["blocks"]}
    T, L, H, C = shape["seen"]
    K, size = shape["maps"]
    rows = [j["seen"][i:i + C] for i in range(0, T * L * H * C, C)]
    begin = lambda k, r: k * size + r * (r + 1) // 2
    maps = [j["maps"][begin(k, r):begin(k, r) + r + 1] for k in range(K) for r in range(C) if "tail" not in j or r != 1]
    worst = max(abs(sum(r) - 1) for r in rows + maps)
    assert worst < 2e-6 and size == C * (C + 1) // 2, (path, worst, size)
    found = j["seen_at"].index(at) * L * H
    return j.get("tail"), C, rows[found:found + L * H], {tuple(h): maps[k * (C - ("tail" in j)):(k + 1) * (C - ("tail" in j))] for k, h in
        enumerate(zip(j["map_head"][::2], j["map_head"][1::2]))}, H
tail, C, cut, maps, H = read(sys.argv[1], 511)
none, whole_C, whole, same, H = read(sys.argv[3], 511)
assert (tail, C, none, whole_C) == (189, 513, None, 512)
def merge(row):
    return [row[0], sum(row[1:tail])] + row[tail:] + [0] * (tail - 1)
apart = max(abs(a - b) for x, y in zip(whole, cut) for a, b in zip(merge(x), y))
assert apart < 2e-6 and len(cut) == len(whole) == 30, apart
for (l, h), rows in maps.items():       # row 511 has place 324 of a map, without the empty row 323
    apart = max(abs(a - b) for a, b in zip(cut[l * H + h], rows[511 - tail + 1]))
    assert apart < 2e-6, (l, h, apart)
tail, C, early, maps, H = read(sys.argv[2], 99)      # a row before the last 511 is shown whole
assert all(r[1] == 0 and abs(sum(r[:101]) - 1) < 2e-6 for r in early)
P
planned=$("$explain" "$model" --ids "$ids" -n 0 --dry-run | sed -n 's/^page *\([0-9.]*\) MB.*/\1/p')
check "a long text's page has the size that was planned ($planned MB)" awk "BEGIN { n = $(wc -c < "$T/long.html") / 1e6
    exit !(n < 1.05 * $planned && n > 0.95 * $planned) }"

# ---- the lens in a terminal ----
lab=$bin/medrun-lab
"$lab" top "$model" -p "$question" -q > "$T/top" 2> "$T/err"; check "top: $(cat "$T/err")" [ $? = 0 ]
check "top has a head and a line for each layer and the embedding" [ "$(wc -l < "$T/top")" = 8 ]
check "top within 80 columns" [ -z "$(tr -d '\302' < "$T/top" | awk 'length > 80')" ]
check "the last layer says the answer" grep -q '^layer 6 .*The .*thirst 9' "$T/top"
check "no colour in a file" [ "$(grep -c "$(printf '\033')" "$T/top")" = 0 ]
"$lab" top "$model" > "$T/top" 2>&1 < /dev/null; check "top without a text is refused" [ $? != 0 ]

# ---- hostile text ----
printf '%s\342\200\250\342\200\256right to left \360\237\251\272' '</script><img src=x onerror=alert(1)> <!-- "\u003c' > "$T/hostile"
code 0 "$model" -f "$T/hostile" -n 8 -o "$T/h.html" -q
check "no script ends early" [ "$(grep -c '</script>' "$T/h.html")" = "$(grep -c '</script>' "$T/a.html")" ]
check "no element of the text's" [ "$(grep -c '<img' "$T/h.html")" = 0 ]

# ---- what it costs ----
code 0 "$model" -p "$question" -n 0 --dry-run
check "a plan: $(cat "$T/out")" grep -q '^page  *0\.[0-9]* MB' "$T/out"
code 0 "$model" -p "$question" -n 0 -o "$T/d.html" -q
planned=$("$explain" "$model" -p "$question" -n 0 --dry-run | sed -n 's/^page *\([0-9.]*\) MB.*/\1/p')
check "the page has the size that was planned ($planned MB)" awk "BEGIN { n = $(wc -c < "$T/d.html") / 1e6
    exit !(n < 1.15 * $planned && n > 0.85 * $planned) }"

# ---- other programs ----
if "$python" -c "import torch, transformers" 2> /dev/null; then
    for f in llama-plain llama-tied llama-sharded llama-grouped mistral-window mistral-spm arcee-yarn arcee-yarn5 \
        apertus-plain apertus-grouped; do
        "$python" tools/reference/explain_fixtures.py "$explain" tests/fixtures/$f "$build/$f-bf16.mdr" > "$T/log" 2>&1 &&
            ok || { bad "$f beside transformers"; tail -3 "$T/log"; }
    done
else skip "numbers beside transformers: no torch for $python"; fi
# a checkpoint in two types: view 10 names what differs
code 0 "$m" --ids "1 2 3 4 5 6 7 8" -n 0 --compare "$build/llama-tied-int4.mdr" -o "$T/t.html" -q
code 0 "$model" --lesson 9 -o "$T/l.html" -q
in_browser "the page in a browser" tests/43_explain_page.py "$T/l.html" "$T/a.html" "$T/c.html" "$T/q.html" "$T/t.html" "$T/long.html" "$T/h.html"
finish
