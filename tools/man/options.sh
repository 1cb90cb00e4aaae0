#!/bin/sh
# options.sh BIN PAGE...: writes the list of options in each manual page anew, from --help of the
# program in BIN that the page is about. So a page says what the program says; `make man` does this,
# and tests/40_install.sh finds a page that was not written anew.
set -eu
bin=$1
shift

# The lines of one --help as they are, each with the COMMAND that it is about in front.
help_of() { # PROGRAM
    commands=$("$bin/$1" --help | sed -nE "s/^$1 \[?([a-z]+)([] ].*)?$/\1/p")
    for command in ${commands:-''}; do
        # shellcheck disable=SC2086
        "$bin/$1" $command --help | sed "s/^/${command:--} /"
    done
}

# The options of all commands, each once with the commands that take it, in mdoc.
list() {
    awk '
    function roff(text) {
        gsub(/\\/, "\\e", text); gsub(/-/, "\\-", text); gsub(/"/, "\\(dq", text)
        return text
    }
    { command = $1; sub(/^[^ ]+ /, "") }
    /^ +(-[a-zA-Z]+, )?--[a-z]/ && match($0, /[^ ]/) <= 7 {
        sub(/^ +/, "")
        at = match($0, /  +/)
        left = at ? substr($0, 1, at - 1) : $0
        help[++n] = at ? substr($0, at + RLENGTH) : ""
        name[n] = left; by[n] = command; open = 1
        next
    }
    /^          +[^ ]/ && open { sub(/^ +/, ""); help[n] = help[n] (help[n] ? " " : "") $0; next }
    { open = 0 }
    END {
        print ".Bl -tag -width Ds"
        for (i = 1; i <= n; i++) {
            key = name[i] "\n" help[i]
            if (!(key in first)) { first[key] = i; order[++m] = key; all[key] = by[i] }
            else if (!index(" " all[key] ",", " " by[i] ",")) all[key] = all[key] ", " by[i]
        }
        for (i = 1; i <= m; i++) {
            split(order[i], part, "\n")
            k = split(part[1], word, " "); line = ".It"; value = ""
            for (j = 1; j <= k; j++) {
                w = word[j]; comma = sub(/,$/, "", w)
                if (w ~ /^-/) { sub(/^-/, "", w); line = line " Fl " roff(w) (comma ? " ," : "") }
                else value = value (value ? "\\ " : "") roff(w)
            }
            print line (value ? " Ar " value : "")
            k = split(roff(part[2]), word, " "); text = ""
            for (j = 1; j <= k; j++) {
                if (length(text word[j]) > 78) { print text; text = "" }
                text = text (text ? " " : "") (!text && word[j] ~ /^[.\047]/ ? "\\&" : "") word[j]
            }
            print text
            if (all[order[i]] != "-") print ".Pq " all[order[i]]
        }
        print ".El"
    }'
}

for page in "$@"; do
    program=$(basename "$page" .1)
    new=$(mktemp)
    help_of "$program" | list > "$new.list"
    awk -v list="$new.list" '
        /^\.\\" options:/ { print; while ((getline line < list) > 0) print line; skip = 1 }
        /^\.\\" end of options/ { skip = 0 }
        !skip && !/^\.\\" options:/' "$page" > "$new"
    cmp -s "$new" "$page" || cat "$new" > "$page"
    rm -f "$new" "$new.list"
done
