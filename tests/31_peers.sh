#!/bin/sh
# 31_peers.sh BIN BUILD: tools/bench_peers.py on a tiny model, where Python and its packages are
# installed (PYTHON names another interpreter). What it says when something is missing, that both
# forms of its answer are whole, and that files are made once.
bin=$1 build=$2
python=${PYTHON:-python3}
T=$build/peers
. tests/script.sh
bad() { failed=$((failed + 1)); echo "FAILED: $1"; cat "$T.err"; }
# peers CODE ARGUMENTS: one turn of each on the tiny shape; out and err beside $T
peers() {
    want=$1; shift
    "$python" tools/bench_peers.py --dir "$T" --shape tiny --lab "$bin/medrun-lab" \
        --export "$bin/medrun-export" -p 32 -n 4 -r 1 -t 1 --retries 0 --wait 0 "$@" \
        > "$T.out" 2> "$T.err"
    rc=$?
    [ $rc = "$want" ] && ok || bad "bench_peers.py $*: exit $rc, wanted $want"
}

if ! "$python" -c pass 2> /dev/null; then
    skip "bench_peers.py: no $python"; finish
fi
has() { "$python" -c "import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }
if ! has gguf numpy; then
    peers 2; [ "$(wc -l < "$T.err")" = 1 ] && grep -q 'pip install' "$T.err" && ok ||
        bad "one line says which package is missing"
    skip "bench_peers.py: no gguf and numpy for $python"; finish
fi

rm -rf "$T" "$T.peer"
# A peer: its own llama-bench says what a real one would, and its llama-quantize writes a file.
mkdir -p "$T.peer"
cat > "$T.peer/llama-bench" <<'END'
#!/bin/sh
[ "$1" = --help ] && { echo "  -d, --n-depth <n>  -fa, --flash-attn <on|off>  -rtr <0|1>"; exit; }
p='"build_number": 1, "build_commit": "made up"'
echo "[{\"n_prompt\": 32, \"n_gen\": 0, \"avg_ts\": 50.5, $p}, {\"n_gen\": 4, \"avg_ts\": 9, $p}]"
END
printf '#!/bin/sh\n[ "$3" = Q8_0 ] && cp "$1" "$2"\n' > "$T.peer/llama-quantize"
chmod +x "$T.peer/llama-bench" "$T.peer/llama-quantize"
peers 2 --lab "$T/none"
[ "$(wc -l < "$T.err")" = 1 ] && ok || bad "one line says that a binary is missing"
peers 0 --types int8 --llama-bench "$T.peer/llama-bench" --llama-bench "fork=$T.peer/llama-bench"
grep -q '^| int8, fork Q8_0 | prompt of 32 | .* | 50.5 (.* | \*\*[0-9.]*\*\* (' "$T.out" && ok ||
    bad "the table has a ratio to the fork"

if ! has llama_cpp; then skip "bench_peers.py: no llama-cpp-python for $python"; finish; fi
peers 0 --types int8
grep -q '^| int8, llama.cpp Q8_0 | prompt of 32 | .* | \*\*[0-9.]*\*\* (' "$T.out" && ok ||
    bad "the table has a ratio"
peers 0 --types int8 --no-pairs --prompts 8,16 --depths 0 --peer-depths --delete -o json
grep -q '^making' "$T.err" && bad "files are made again" || ok
[ -e "$T/tiny-2-int8.mdr" ] && ok || bad "--delete removes what was there before"
"$python" -c 'import json, sys
r = json.load(open(sys.argv[1]))
lengths = [row["n"] for row in r["prompts"]]
sys.exit(lengths != [8, 16] or not r["depths"][0]["peers"][0]["tg"]["ratio"])
' "$T.out" && ok || bad "the JSON has both tables"
finish
