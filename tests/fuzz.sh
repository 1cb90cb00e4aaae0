#!/bin/sh
# fuzz.sh PROGRAM SECONDS [READER...]: fuzzes each reader of a stranger's bytes (tests/fuzz.c) for
# so long; of medrun-serve (tests/fuzz_serve.c, a program beside it) http and api. What is found stays in build/fuzz/READER. Last line as in the tests.
program=$(realpath "$1") seconds=$2
shift 2
root=$PWD
[ $# -gt 0 ] || set -- header tokenizer json jinja messages state gguf schema gbnf regex http api \
    config.json tokenizer.json tokenizer_config.json generation_config.json model.safetensors
passed=0 failed=0
for reader in "$@"; do
    dir=build/fuzz/$reader
    mkdir -p "$dir/corpus" && rm -rf "$dir/folder"
    case $reader in
        header) base=build/llama-grouped-int8.mdr ;;
        tokenizer) base=build/tokenizer.bin ;;
        jinja) base=tests/fixtures/jinja.json ;;
        gguf) base=tests/fixtures/gguf/llama-small-bf16.gguf ;;
        *.*) base=tests/fixtures/llama-small/$reader; cp -r tests/fixtures/llama-small "$dir/folder" ;;
        *) base=build/llama-plain-int8.mdr ;;
    esac
    run=$program
    case $reader in http|api) run=${program%readers}serve; base=build/llama-grouped-int8.mdr ;; esac
    log=$dir/log
    (cd "$dir" && MEDRUN_FUZZ=$reader MEDRUN_FUZZ_BASE=$root/$base "$run" corpus -close_fd_mask=1 \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -malloc_limit_mb=256 \
        -max_len=300000 -print_final_stats=1) > "$log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    if [ $status -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        passed=$((passed + 1))
        echo "$reader: $runs inputs, nothing found"
    else
        failed=$((failed + 1))
        echo "$reader: status $status, see $log"
        grep -E 'ERROR|SUMMARY|runtime error|fuzz:' "$log" | head -5
    fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
