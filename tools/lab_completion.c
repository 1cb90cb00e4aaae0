/* lab_completion.c: medrun-lab completion: scripts with which shells complete the lines of all
 * programs. Included by lab.c. MIT licence, see LICENSE. */

#define PROGRAMS "medrun medrun-eval medrun-explain medrun-export medrun-lab medrun-serve"

/* What a shell runs when Tab is pressed. It asks the program for --help: so it offers the commands
 * and options that this build has. */
static const char *const completions[][2] = {
    {"bash",
     "_medrun() {\n"
     "    local first= show=\"s/^${1##*/} \\\\[?([a-z]+).*/\\\\1/p\"\n"
     "    ((COMP_CWORD > 1)) && first=${COMP_WORDS[1]} show=\n"
     "    [[ $2 == -* ]] && show='s/^ {2,6}(-[a-zA-Z]+, )?(--[a-z0-9-]+).*/\\2/p'\n"
     "    show=$(\"$1\" $first --help 2> /dev/null | sed -nE \"$show\")\n"
     "    COMPREPLY=($(compgen -W \"$show\" -- \"$2\"))\n"
     "}\n"
     "complete -o default -F _medrun " PROGRAMS "\n"},
    {"zsh",
     "#compdef " PROGRAMS "\n"
     "_medrun() {\n"
     "    local first= show=\"s/^${words[1]:t} \\\\[?([a-z]+).*/\\\\1/p\"\n"
     "    ((CURRENT > 2)) && first=$words[2] show=\n"
     "    [[ $PREFIX == -* ]] && show='s/^ {2,6}(-[a-zA-Z]+, )?(--[a-z0-9-]+).*/\\2/p'\n"
     "    show=$($words[1] $first --help 2> /dev/null | sed -nE \"$show\")\n"
     "    compadd -- ${(f)show} || _files\n"
     "}\n"
     "if [[ $funcstack[1] == _medrun ]]; then _medrun\n"
     "else compdef _medrun " PROGRAMS "; fi\n"},
    {"fish",
     "function __medrun\n"
     "    set -l line (commandline -opc)\n"
     "    set -l show '^'(path basename $line[1])' \\\\[?([a-z]+).*' '$1'\n"
     "    set -q line[2]; and set show '^$' ''\n"
     "    string match -q -- '-*' (commandline -ct)\n"
     "    and set show '^ {2,6}(?:-[a-zA-Z]+, )?(--[a-z0-9-]+)(?: \\\\S+)? +(\\\\S.*)' '$1\\t$2'\n"
     "    $line[1] $line[2] --help 2> /dev/null | string replace -rf $show\n"
     "end\n"
     "for program in " PROGRAMS "\n"
     "    complete -c $program -a '(__medrun)'\n"
     "end\n"},
};

static int completion_command(command *c) {
    for (size_t i = 0; c->n_rest && i < sizeof completions / sizeof *completions; i++)
        if (!strcmp(c->rest[0], completions[i][0]))
            return fputs(completions[i][1], stdout), MEDRUN_OK;
    return USAGE(c, "completion: wanted bash, zsh or fish");
}
