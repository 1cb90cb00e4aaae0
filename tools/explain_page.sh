#!/bin/sh
# explain_page.sh: the page of medrun-explain (explain_page.html, .css and .js) as C strings, a line
# each, to stdout; `make` writes explain_page.h with it.
cd "$(dirname "$0")" || exit 1
strings() { sed 's/\\/\\\\/g; s/"/\\"/g; s/^/    "/; s/$/\\n",/'; }
whole() { awk '/^@STYLE@$/ { while ((getline line < "explain_page.css") > 0) print line; next }
               /^@SCRIPT@$/ { while ((getline line < "explain_page.js") > 0) print line; next }
               { print }' explain_page.html; }
echo '/* Made by tools/explain_page.sh from explain_page.html, .css and .js. */'
echo 'static const char *const page_start[] = {'
whole | sed '/^@DATA@$/,$d' | strings
echo '};'
echo 'static const char *const page_end[] = {'
whole | sed '1,/^@DATA@$/d' | strings
echo '};'
