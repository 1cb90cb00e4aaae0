#!/bin/sh
# 40_install.sh BIN BUILD: what people find after `make install`: programs, manual pages, completions,
# demo model, library, pkg-config; and that `make uninstall` takes it all away. In make test-all also the
# package for Debian and the wheel for Python.
bin=$(cd "$1" && pwd) build=$(cd "$2" && pwd)
cc=${CC:-cc}
. tests/script.sh
log="$build/install.log" to="$build/install" demo=tools/demo/demo.mdr
question="What are the symptoms of diabetes?"
programs=$(sed -n 's/^TOOLS *= *//p' Makefile | sed 's/\$(if[^,]*,,\(.*\))/\1/')
run() { MAKEFLAGS='' make -s "$@" CC="$cc" CFLAGS="-O0 -DMEDRUN_SCALAR" BIN="$bin" OBJ="$build" BUILD="$build/install-lib" \
    PREFIX="$to" > "$log" 2>&1 && ok || { bad "make $1"; cat "$log"; }; }
answers() { # COMMAND...: with the word that belongs there
    "$@" 2> "$log" | grep -q thirst && ok || { bad "$*"; cat "$log"; }
}

# The programs are not made anew: they may have been built with other flags.
rm -rf "$to"
: > "$build/install.began"
run install
check "make install takes the programs that are there" [ ! "$bin/medrun-serve" -nt "$build/install.began" ]
for p in $programs; do
    "$to/bin/$p" --version | grep -q "^$p [0-9]" && ok || bad "$p is not installed"
    [ -s "$to/share/man/man1/$p.1" ] && ok || bad "$p has no manual page"
    for f in bash-completion/completions/$p fish/vendor_completions.d/$p.fish; do
        [ -s "$to/share/$f" ] && ok || bad "$f"
    done
done
answers "$to/bin/medrun" run -q "$to/share/medrun/demo.mdr" -p "$question"
if command -v pkg-config > /dev/null; then
    sed 's/"medrun.c"/<medrun.h>/' tools/examples/ask.c > "$build/installed_ask.c"
    export PKG_CONFIG_PATH="$to/lib/pkgconfig"
    # shellcheck disable=SC2046
    $cc -o "$build/installed_ask" "$build/installed_ask.c" $(pkg-config --cflags --libs medrun) 2> "$log" &&
        answers env LD_LIBRARY_PATH="$to/lib" "$build/installed_ask" $demo "$question" || cat "$log"
    # shellcheck disable=SC2046
    $cc -o "$build/installed_ask" "$build/installed_ask.c" "$to/lib/libmedrun.a" $(pkg-config --cflags medrun) \
        $(sed -n 's/^Libs.private: //p' "$to/lib/pkgconfig/medrun.pc") 2> "$log" &&
        answers "$build/installed_ask" $demo "$question" || cat "$log"
else skip "no pkg-config"; fi

# Each page is as --help says, has each command, and pleases mandoc and groff.
mkdir -p "$build/man"
for p in $programs; do
    page="$build/man/$p.1"
    cp "tools/man/$p.1" "$page"
    sh tools/man/options.sh "$bin" "$page" && cmp -s "$page" "tools/man/$p.1" && ok ||
        { bad "tools/man/$p.1: not as $p --help: make man"; diff "tools/man/$p.1" "$page" | head -5; }
    for command in '' $("$bin/$p" --help | sed -nE "s/^$p \[?([a-z]+)[] ].*/\1/p"); do
        # shellcheck disable=SC2086
        long=$("$bin/$p" $command --help | awk 'length($0) > 78' | head -3)
        [ -z "$long" ] && ok || bad "$p $command --help is wider than 78 columns: $long"
    done
    options=$(sed -n '/^\.\\" options:/,/^\.\\" end/p' "$page" | grep -c '^\.It Fl')
    [ "$options" -ge 10 ] && ok || bad "tools/man/$p.1 has $options options"
    for command in $("$bin/$p" --help | sed -nE "s/^$p \[?([a-z]+)[] ].*/\1/p"); do
        grep -q "^\.It Cm $command" "$page" && ok || bad "tools/man/$p.1: no command $command"
    done
    if command -v mandoc > /dev/null; then
        said=$(mandoc -T lint -W style "$page" | grep -v 'referenced manual not found')
        [ -z "$said" ] && ok || bad "$said"
    else skip "no mandoc for $p.1"; fi
    if command -v groff > /dev/null && [ -e /usr/share/groff ] && groff -mdoc -Tascii < /dev/null > /dev/null 2>&1; then
        said=$(groff -ww -mdoc -Tascii "$page" 2>&1 > /dev/null)
        [ -z "$said" ] && ok || bad "$said"
    else skip "no groff for $p.1"; fi
done

# Completions. What is offered behind "medrun run --" is what its help has.
wanted=$("$bin/medrun" run --help | sed -nE 's/^ {2,6}(-[a-zA-Z]+, )?(--[a-z0-9-]+).*/\2/p' | sort -u | tr '\n' ' ')
[ "$(echo "$wanted" | wc -w)" -ge 20 ] && ok || bad "help has no options: $wanted"
if command -v bash > /dev/null; then
    cat > "$build/complete.bash" <<'EOF'
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_medrun "$1" "${!#}"
printf '%s\n' "${COMPREPLY[@]}" | sort -u | tr '\n' ' '
EOF
    offers() { # WANTED WORD...
        want=$1
        shift
        found=$(PATH="$bin:$PATH" bash "$build/complete.bash" "$to/share/bash-completion/completions/medrun" "$@")
        [ "$found" = "$want" ] && ok || bad "bash offers behind $*: $found"
    }
    offers "$wanted" medrun run --
    offers "verify " medrun veri
    offers " " medrun run ""
    offers "--type " medrun-export folder --ty
    offers "replay " "$bin/medrun-lab" rep
    offers "--shard " medrun-eval model medqa --sh
else skip "no bash"; fi
if command -v fish > /dev/null; then
    found=$(PATH="$bin:$PATH" fish -c "source $to/share/fish/vendor_completions.d/medrun.fish
        complete -C 'medrun run --'" 2> "$log" | sed 's/\t.*//' | sort -u | tr '\n' ' ')
    [ "$found" = "$wanted" ] && ok || { bad "fish offers: $found"; cat "$log"; }
    PATH="$bin:$PATH" fish -c "source $to/share/fish/vendor_completions.d/medrun.fish
        complete -C 'medrun run --see'" | grep -q "^--seed.*random" && ok || bad "fish says not what --seed is"
else skip "no fish"; fi
if command -v zsh > /dev/null; then
    # Tab is pressed in a terminal; what stands on the line then is run, and writes itself down.
    mkdir -p "$build/zsh"
    printf '#!/bin/sh\ncase "$*" in *--help) exec %s/medrun "$@" ;; esac\necho "$@" >> %s/out\n' \
        "$bin" "$build/zsh" > "$build/zsh/medrun"
    chmod +x "$build/zsh/medrun"
    cat > "$build/zsh/keys" <<'EOF'
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1=; PATH=$1:\$PATH; autoload -U compinit; compinit -u -D; source $2; medrun ready"
for i in {1..100}; do [[ -e $1/out ]] && break; sleep 0.1; done
zpty -w shell $'medrun run --see\t5'
zpty -w shell $'medrun verif\t'
for i in {1..100}; do (( $(wc -l < $1/out) == 3 )) && break; sleep 0.1; done
EOF
    rm -f "$build/zsh/out"
    zsh -f "$build/zsh/keys" "$build/zsh" "$to/share/zsh/site-functions/_medrun" > "$log" 2>&1
    found=$(tr '\n' ';' < "$build/zsh/out")
    [ "$found" = "ready;run --seed 5;verify;" ] && ok || { bad "zsh completes: $found"; cat "$log"; }
else skip "no zsh"; fi

run uninstall
left=$(find "$to" -type f -o -type l)
[ -z "$left" ] && ok || bad "make uninstall leaves $left"

# The wheel, in a new environment that knows nothing else; the binding finds the library in it.
only_in_test_all "a wheel and packages for Debian"
if command -v python3 > /dev/null && python3 -m venv "$build/venv" > "$log" 2>&1 && "$build/venv/bin/pip" --version > "$log" 2>&1
then
    rm -rf "$build/wheel"
    CC="$cc" CFLAGS="-O1 -DMEDRUN_SCALAR" "$build/venv/bin/pip" wheel -q --no-index -w "$build/wheel" \
        tools/packaging/python > "$log" 2>&1 && ok || { bad "pip wheel"; cat "$log"; }
    "$build/venv/bin/pip" install -q --no-index --force-reinstall "$build"/wheel/medrun-*.whl > "$log" 2>&1 && ok ||
        { bad "pip install"; cat "$log"; }
    there=$PWD
    cd "$build/venv" || exit
    answers env -i bin/python -m medrun "$there/$demo" "$question"
    env -i bin/python -m medrun 2>&1 | grep -q '^usage: ' && ok || bad "python -m medrun says not how"
    env -i bin/python -c "import medrun, sys; print(len(medrun.Model(sys.argv[1]).logits('What')))" \
        "$there/$demo" > "$log" 2>&1 && grep -qx 4096 "$log" && ok || { bad "the wheel's logits"; cat "$log"; }
    cd "$there" || exit
else skip "no python3 with venv and pip"; fi

if command -v dpkg-buildpackage > /dev/null && command -v dh > /dev/null && [ -e .git ]; then
    rm -rf "$build/deb" "$build/deb-root"
    DEB_CFLAGS_SET="-O1 -DMEDRUN_SCALAR" sh tools/packaging/deb.sh "$build/deb" > "$log" 2>&1 && ok ||
        { bad "deb.sh"; tail -20 "$log"; }
    for package in "$build"/deb/medrun_*.deb "$build"/deb/libmedrun-dev_*.deb; do
        dpkg-deb -x "$package" "$build/deb-root" && ok || bad "$package"
    done
    cd "$build/deb-root/usr" || exit
    answers bin/medrun run -q share/medrun/demo.mdr -p "$question"
    for f in share/man/man1/medrun.1.gz share/man/man1/medrun-eval.1.gz share/doc/medrun/README.md* \
        share/bash-completion/completions/medrun-lab share/zsh/vendor-completions/_medrun \
        include/medrun.h lib/*/libmedrun.so lib/*/pkgconfig/medrun.pc; do
        [ -e "$f" ] && ok || bad "the packages have no $f"
    done
else skip "no dpkg-buildpackage with debhelper, or no git repository"; fi
finish
